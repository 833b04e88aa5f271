"""kill -9 during a build, at random: what is built in the end has the bytes of a build that nobody killed.

    python -m benchmarks.data_kills         # ten kills; writes benchmarks/results/data_kills.md; needs apt-get, 2 GB
    python -m benchmarks.data_kills 30 7    # thirty, with seed 7; writes nothing

The blend `docs_small`, with the workers that a user gets. Killed are, in turn, the command, the engine that it started
and a worker of the engine, each of which leaves the others behind; the same command then goes on.
"""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from nemo_upcycle.data.finished import BUILD, MANIFEST
from nemo_upcycle.utils.files import read_json


RESULTS = Path(__file__).parent / "results" / "data_kills.md"
KILLS, SEED = 10, 1
VICTIMS = ("the command", "the engine", "a worker")


def start(output: Path) -> subprocess.Popen[bytes]:
    """Start the build, or go on with it."""
    command = [sys.executable, "-m", "nemo_upcycle.cli", "data", "docs_small", str(output)]
    return subprocess.Popen([*command, "tokenizer=asset://smollm2-135m"], stderr=subprocess.DEVNULL)


def kill(process: subprocess.Popen[bytes], victim: str, chance: random.Random) -> int:
    """Kill one process of a build with SIGKILL; return how many it left behind."""
    command = psutil.Process(process.pid)
    family = command.children(recursive=True)
    engines = [child for child in family if child.ppid() == process.pid]
    workers = [child for child in family if child not in engines]
    which = {"the command": [command], "the engine": engines or [command], "a worker": workers or [command]}[victim]
    chance.choice(which).kill()
    process.wait(60)
    return len(psutil.wait_procs(family, timeout=10)[1])


def digests(output: Path) -> dict[str, str]:
    """Return the hash of every file of a finished folder, and of what was removed, but the manifest's."""
    found = {}
    for path in sorted(path for path in output.rglob("*") if path.is_file()):
        name = str(path.relative_to(output))
        if name.startswith(f"{BUILD}/removed/") or (not name.startswith((BUILD, ".")) and name != MANIFEST):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main(words: list[str]) -> None:
    """Build once, build with kills, compare, and write the results."""
    kills, seed = (int(words[0]) if words else KILLS), (int(words[1]) if len(words) > 1 else SEED)
    chance = random.Random(seed)
    with TemporaryDirectory(prefix="nemo-upcycle-benchmark-") as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        start_s = time.monotonic()
        if start(whole).wait():
            raise SystemExit("the build failed")
        whole_s = time.monotonic() - start_s
        lines = ["| kill | of | after, s | processes alive 10 s later |", "|---:|---|---:|---:|"]
        for number in range(kills):
            after_s, victim = chance.uniform(0.5, whole_s), VICTIMS[number % len(VICTIMS)]
            process = start(killed)
            try:
                process.wait(after_s)
                lines.append(f"| {number + 1} | none: it had finished | | |")
                break
            except subprocess.TimeoutExpired:
                lines.append(f"| {number + 1} | {victim} | {after_s:.1f} | {kill(process, victim, chance)} |")
                print(lines[-1], flush=True)
        if start(killed).wait():
            raise SystemExit("the killed build did not go on")
        first, second = digests(whole), digests(killed)
        differ = [name for name in first.keys() | second.keys() if first.get(name) != second.get(name)]
        manifests = [read_json(output / MANIFEST) for output in (whole, killed)]
        steps = [[entry["steps"] for entry in manifest["sources"].values()] for manifest in manifests]
    unbalanced = [
        step
        for steps_ in steps[1]
        for step in steps_.values()
        if step["in"] != step["kept"] + sum(step["removed"].values())
    ]
    lines += [
        "",
        f"Compared: {len(first)} files, {len(differ)} differ{': ' if differ else ''}{', '.join(differ)}. Manifests "
        f"{'equal' if manifests[0] == manifests[1] else 'DIFFER'}. Steps at which what comes in is not what is kept "
        f"and removed: {len(unbalanced)}.",
    ]
    how = f"{kills} kills, seed {seed}; a build without a kill takes {whole_s:.0f} s"
    text = f"`python -m benchmarks.data_kills`, {how}\n\n"
    if not words:
        RESULTS.write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    print(text + "\n".join(lines))
    if differ or unbalanced or manifests[0] != manifests[1]:
        raise SystemExit("not the same")


if __name__ == "__main__":
    main(sys.argv[1:])
