"""Measure each command's processor time until it answers, and the share of imports in this time.

    python -m benchmarks.answers          all commands, in 3 minutes; writes the table into results/answers.md
    python -m benchmarks.answers plan     prints the commands that begin with `nemo-upcycle plan` or `nemo plan`

Other work on the machine changes processor time less than wall time. Still, measure on a quiet machine. NeMo's
commands import NeMo before they read their arguments.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.arguments import chosen
from nemo_upcycle.cli.main import COMMANDS


ROOT = Path(__file__).parents[1]
DATA, PAGE = ROOT / "benchmarks/results/answers.json", ROOT / "benchmarks/results/answers.md"
#: The time of the package OURS has a separate column. Only imports of at least LONG_S seconds are named.
OURS, LONG_S = "nemo_upcycle", 0.05
HEADINGS = ("command", "status", "processor s", "this package", "imports of others", "the longest of them")
CHAIN = "nemo upcycle pipeline --factory"
SLURM = "run.executor=slurm run.executor.account=me run.executor.partition=a"
ASKED = (
    "nemo-upcycle --help",
    *(f"nemo-upcycle {name} --help" for name in COMMANDS),
    "nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 64",
    "nemo-upcycle data sotu blend tokenizer=asset://smollm2-135m --check",
    "nemo-upcycle convert . moe --experts 1000000000",
    "nemo-upcycle report .",
    "nemo-upcycle doctor",
    "nemo upcycle --help",
    "nemo upcycle pipeline recipe=llama3_8b_e8t2_pretrain_512gpu_h100_bf16_config dense=mine dir=run --dryrun",
    f"{CHAIN} smollm2_135m_e8t2 dir=run dense=/nope --yes",
    f"{CHAIN} smollm2_135m_e8t2 dir=run --dryrun",
    f"{CHAIN} llama3_8b_e8t2 dir=run {SLURM} --dryrun",
    "nemo llm pretrain --factory llama3_8b_e8t2 --dryrun",
)


class Taken(NamedTuple):
    """The result of a command: its exit status and its processor seconds.

    `own_s` are the seconds of this package, and `imports_s` the seconds of importing other packages. `imports` lists
    the longest imports of other packages.
    """

    status: int
    seconds: float
    own_s: float
    imports_s: float
    imports: dict[str, float]


def measure(command: str, folder: Path) -> Taken:
    """Run a command in a folder, and measure its processor time."""
    output = folder / "imports.json"
    start_s = sum(os.times()[2:4])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.imports", output, *command.split()],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    seconds, found = sum(os.times()[2:4]) - start_s, json.loads(output.read_text(encoding="utf-8"))
    others = {name: taken_s for name, taken_s in found["imports"].items() if name != OURS}
    imports_s = sum(others.values())
    longest = sorted(
        ((round(taken_s, 2), name) for name, taken_s in others.items() if taken_s >= LONG_S), reverse=True
    )
    rounded = (round(one_s, 2) for one_s in (seconds, found["seconds"] - imports_s, imports_s))
    return Taken(done.returncode, *rounded, {name: one_s for one_s, name in longest})


def row(command: str, taken: Taken) -> str:
    """Return a row of the table."""
    longest = ", ".join(f"{name} {taken_s:.1f}" for name, taken_s in list(taken.imports.items())[:3])
    cells = (
        f"`{command}`",
        taken.status,
        f"{taken.seconds:.1f}",
        f"{taken.own_s:.2f}",
        f"{taken.imports_s:.1f}",
        longest,
    )
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    """Print the table; write it into its page if all commands were measured."""
    words = chosen(__doc__, sys.argv[1:], [*COMMANDS, "upcycle", "llm"])
    begun = tuple(f"{program} {word}" for program in ("nemo-upcycle", "nemo") for word in words) or ("",)
    asked = [command for command in ASKED if command.startswith(begun)]
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    print("\n".join(lines))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for command in asked:
            found[command] = measure(command, Path(folder))
            lines.append(row(command, found[command]))
            print(lines[-1], flush=True)
    if len(asked) < len(ASKED):
        return
    DATA.write_text(
        json.dumps({name: taken._asdict() for name, taken in found.items()}, indent=1) + "\n", encoding="utf-8"
    )
    table = re.compile(rf"\| {HEADINGS[0]} \| {HEADINGS[1]} .*?(?=\n\n|\n\Z)", re.DOTALL)
    PAGE.write_text(table.sub(lambda _: "\n".join(lines), PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
