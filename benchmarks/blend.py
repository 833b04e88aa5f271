"""The whole data stage on real text: what each step costs, and whether memory grows with the data.

    python -m benchmarks.blend              # 0.1 and 0.9 GB; needs apt-get and 4 GB
    python -m benchmarks.blend 1 8 90       # 10 GB, too; writes benchmarks/results/blend.md; needs 25 GB

The texts of `benchmarks.tokenise`, so many times over (each copy's documents begin with its number: none is a
duplicate), decontaminated against all of MMLU and tokenised with SmolLM2's tokenizer on all cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.tokenise import corpus
from nemo_upcycle.data.dense import ensure_dense


RESULTS = Path(__file__).parent / "results" / "blend.md"
COPIES, KEPT = (1, 8), ["1", "8", "90"]


def write_copies(folder: Path, copies: int) -> Path:
    """Write the texts so many times, one file a copy, and the blend that names them; return the blend."""
    for copy in range(copies):
        with (folder / f"{copy}.jsonl").open("w", encoding="utf-8") as handle:
            for line in corpus().open(encoding="utf-8"):
                handle.write(json.dumps({"text": f"{copy} {json.loads(line)['text']}"}, ensure_ascii=False) + "\n")
    blend = folder / "docs.yaml"
    blend.write_text(
        f"sources: {{docs: {{train: ['*.jsonl']}}}}\ndecontaminate: [full]\n"
        f"tokenizer: {ensure_dense('asset://smollm2-135m')}\n"
    )
    return blend


def peaks_mib(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Wait for the tool; return the peak of its own memory, and of the largest process of the engine."""
    peaks = {True: 0, False: 0}
    while process.poll() is None:
        for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
            try:
                status = Path(f"/proc/{one.pid}/status").read_text()
            except OSError:  # it has ended
                continue
            if "VmHWM:" in status:
                is_tool = one.pid == process.pid
                peaks[is_tool] = max(peaks[is_tool], int(status.partition("VmHWM:")[2].split()[0]))
        time.sleep(0.2)
    return peaks[True] / 1024, peaks[False] / 1024


def build(copies: int) -> dict[str, Any]:
    """Build the blend; return its times, its memory, and what every task counted."""
    with TemporaryDirectory(prefix="nemo-upcycle-benchmark-") as folder:
        blend, output = write_copies(Path(folder), copies), Path(folder) / "data"
        start_s = time.monotonic()
        command = [sys.executable, "-m", "nemo_upcycle.cli", "data", str(blend), str(output)]
        with subprocess.Popen(command) as process:
            tool_mib, engine_mib = peaks_mib(process)
        if process.returncode:
            raise SystemExit(process.returncode)
        wall_s, load = time.monotonic() - start_s, os.getloadavg()[1]
        stats = [json.loads(path.read_text()) for path in sorted((output / "build/stats").glob("*.json"))]
    seconds: Counter[str] = Counter()
    for entry in stats:
        seconds.update(entry["seconds"])
    return {
        "size_mb": sum(entry["bytes_in"] for entry in stats) / 1e6,
        "documents": sum(entry["steps"]["read"]["in"] for entry in stats),
        "seconds": seconds,
        "wall_s": wall_s,
        "load": load,
        "tool_mib": tool_mib,
        "engine_mib": engine_mib,
    }


def main(words: list[str]) -> None:
    """Measure, and write the results."""
    builds = []
    for copies in [int(word) for word in words] or COPIES:
        builds.append(build(copies))
        print(builds[-1], flush=True)
    lines = [
        f"`python -m benchmarks.blend {' '.join(words)}`, {os.cpu_count()} workers on as many cores; a load above "
        "theirs is of other work",
        "",
        "| JSON lines, MB | documents | wall, s | load, 5 min | tool's peak, MiB | engine's largest peak, MiB |",
        "|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {b['size_mb']:,.0f} | {b['documents']:,} | {b['wall_s']:.0f} | {b['load']:.1f} | {b['tool_mib']:.0f} "
            f"| {b['engine_mib']:.0f} |"
            for b in builds
        ),
        "",
        "CPU seconds of the writing pass, MB per core-second; the pass before it, which signs, reads once more:",
        "",
        "| step | " + " | ".join(f"{b['size_mb']:,.0f} MB" for b in builds) + " |",
        "|---|" + "---:|" * len(builds),
    ]
    for step in [*builds[0]["seconds"], "all"]:
        cells = []
        for b in builds:
            step_s = sum(b["seconds"].values()) if step == "all" else b["seconds"][step]
            cells.append(f"{step_s:.1f} s, {b['size_mb'] / step_s:.1f}" if step_s > 0.05 else "0")
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    if words == KEPT:
        RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
