"""Compare the time and peak memory of offline conversion, of `cp` of its output, and of mergekit-moe.

    python -m benchmarks.convert            # writes benchmarks/results/convert.md; needs 60 GB of disk
    python -m benchmarks.convert smollm2    # one of the models

Every run starts with its input in the page cache and ends with its output on the disk (`sync -f`). The competitors
take turns. `smollm2` is the real model. `llama1b` has the shapes of Llama 3.2 1B and random weights. `llama8b` has the
shapes of Llama 3 8B in a sparse file. The output of `llama8b` is larger than the memory of most laptops. So the page
cache cannot hold the input of `cp`, and `cp` is not measured for `llama8b`. On a virtual disk, writing the zeros of
this output may take less time than writing weights. mergekit is installed in a separate environment on first use.
mergekit gets the same parent for every expert. The gates are random, because mergekit's other kinds of gates need
prompts.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir

import yaml

from benchmarks.arguments import chosen
from benchmarks.bytes_read import write_sparse
from benchmarks.upcycle import dense_folder, tabulate


RESULTS = Path(__file__).parent / "results" / "convert.md"
#: name of a model -> experts and top-k
MODELS = {"smollm2": (8, 2), "llama1b": (4, 2), "llama8b": (2, 2)}
COPY = "cp -r of the output"
MERGEKIT = "mergekit==0.1.5"
REPEATS = 5


#: A program that runs a command and prints its peak memory. The program must be small, because a child's peak memory
#: starts at the memory of its parent process.
_WATCH = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(status, used.ru_maxrss)
"""


@dataclass(frozen=True)
class Run:
    """One measured command."""

    seconds: float
    peak_rss_gib: float


def measure(command: list[str], output: Path) -> Run:
    """Run a command that writes `output`, and wait until the output is on the disk."""
    shutil.rmtree(output, ignore_errors=True)
    subprocess.run(["sync", "-f", str(output.parent)], check=True)
    start_s = time.perf_counter()
    done = subprocess.run([sys.executable, "-S", "-c", _WATCH, *command], capture_output=True, text=True)
    subprocess.run(["sync", "-f", str(output.parent)], check=True)
    seconds = time.perf_counter() - start_s
    status, peak_kib = map(int, done.stdout.split())
    if status:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return Run(seconds, peak_kib / 2**20)


def mergekit_command(source: Path, experts: int, top_k: int, folder: Path, output: Path) -> list[str]:
    """Return the command that makes the same model with mergekit; install mergekit if it is missing."""
    environment = Path(gettempdir()) / "nemo-upcycle-benchmark-mergekit"
    program = environment / "bin" / "mergekit-moe"
    if not program.is_file():
        venv.create(environment, with_pip=True)
        subprocess.run([environment / "bin" / "pip", "install", "-q", MERGEKIT], check=True)
    config = {
        "base_model": str(source),
        "gate_mode": "random",
        "dtype": "bfloat16",
        "experts_per_token": top_k,
        "experts": [{"source_model": str(source), "positive_prompts": [""]}] * experts,
    }
    path = folder / "mergekit.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return [str(program), str(path), str(output)]


def source_of(model: str, folder: Path) -> Path:
    """Return the dense checkpoint."""
    if model != "llama8b":
        return dense_folder(model)
    sparse = folder / "llama8b"
    sparse.mkdir()
    write_sparse(sparse)
    return sparse


def _warm(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as handle:
            while handle.read(2**24):
                pass


def runs_of(model: str, folder: Path) -> tuple[dict[str, list[Run]], float]:
    """Measure all commands on one model, and return their runs and the size of our output (GB)."""
    experts, top_k = MODELS[model]
    source, ours, copied = source_of(model, folder), folder / "ours", folder / "copied"
    convert = ["convert", str(source), str(ours), "--experts", str(experts), "--top-k", str(top_k)]
    commands = {
        "nemo-upcycle convert": ([str(Path(sys.executable).with_name("nemo-upcycle")), *convert], source, ours)
    }
    if model != "llama8b":
        commands[COPY] = (["cp", "-r", str(ours), str(copied)], ours, copied)
    if model == "smollm2":
        merged = folder / "merged"
        command = mergekit_command(source, experts, top_k, folder, merged)
        commands["mergekit-moe"] = (command, source, merged)
    found: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(REPEATS if model != "llama8b" else 1):  # the commands take turns: a machine's speed changes
        for name, (command, reads, writes) in commands.items():
            _warm(reads)
            found[name].append(measure(command, writes))
    return found, sum(path.stat().st_size for path in ours.iterdir()) / 1e9


def table(models: list[str]) -> str:
    """Return the results as Markdown."""
    rows = [
        "| model | what | written, GB | time, s: median (all) | against cp | peak RSS, GiB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for model in models:
        experts, top_k = MODELS[model]
        with TemporaryDirectory(prefix="nemo-upcycle-convert-", dir=Path.cwd()) as folder:
            found, size_gb = runs_of(model, Path(folder))
        copy_s = median(run.seconds for run in found[COPY]) if COPY in found else None
        for name, runs in found.items():
            middle_s = median(run.seconds for run in runs)
            ratio = f"{middle_s / copy_s:.2f}x" if copy_s else ""
            every = ", ".join(f"{run.seconds:.1f}" for run in runs)
            peak_gib = max(run.peak_rss_gib for run in runs)
            label = f"{model} -> E{experts}T{top_k} | {name} | {size_gb:.1f}"
            rows.append(f"| {label} | {middle_s:.1f} ({every}) | {ratio} | {peak_gib:.2f} |")
            print(rows[-1], flush=True)
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> None:
    """Measure, and print and write the table."""
    tabulate(chosen(__doc__, arguments, MODELS), MODELS, table, RESULTS, f"{REPEATS} runs in turn, for llama8b one")


if __name__ == "__main__":
    main(sys.argv[1:])
