"""Fit the planner's throughput model on published H100 rows, and write table and plot of docs/planning.md.

    python -m benchmarks.throughput            predictions with the constants of the package, leave-one-out errors
    python -m benchmarks.throughput --fit      fit the constants anew and print them
    python -m benchmarks.throughput --write    put table and plot into docs/

Least squares on the logarithm of predicted over published tokens/s, with a weak pull towards the starting values.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.published import Published, published_rows
from nemo_upcycle.planning.hardware import Machine


#: What is fitted, with where it starts. All other constants of `Machine` stay as they are.
START = {"gemm": 0.6, "gemm_fp8": 0.55, "moe_us": 600.0, "imbalance": 1.1}
#: Weight of the pull: a constant that leaves its start by a factor e costs as much as an error of 14 %.
PULL = 0.02
DOCS = Path(__file__).resolve().parent.parent / "docs"


def fit(rows: Sequence[Published]) -> Machine:
    """Return the machine whose predictions come nearest to the rows."""
    from scipy.optimize import minimize

    def machine(logs: Sequence[float]) -> Machine:
        values = {name: start * math.exp(log) for (name, start), log in zip(START.items(), logs, strict=True)}
        return replace(Machine(), **values)

    def cost(logs: Sequence[float]) -> float:
        candidate = machine(logs)
        misses = [math.log(row.predicted(candidate) / row.tokens_per_s_per_gpu) for row in rows]
        return sum(miss * miss for miss in misses) + PULL * sum(log * log for log in logs)

    options = {"xatol": 1e-3, "fatol": 1e-7, "maxiter": 2000}
    return machine(minimize(cost, [0.0] * len(START), method="Nelder-Mead", options=options).x)


def error(row: Published, machine: Machine) -> float:
    """Return predicted over published, less one."""
    return row.predicted(machine) / row.tokens_per_s_per_gpu - 1


def main() -> None:
    """Print, and write if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = published_rows()
    fitted = [row for row in rows if row.fitted]
    machine = fit(fitted) if args.fit else Machine()
    if args.fit:
        print({name: float(f"{getattr(machine, name):.3g}") for name in START})
    left_out = {row.name: error(row, fit([other for other in fitted if other is not row])) for row in fitted}
    text = table(rows, machine, left_out)
    print(text)
    if args.write:
        path = DOCS / "planning.md"
        begin, end = "<!-- throughput table -->", "<!-- end of table -->"
        page = path.read_text(encoding="utf-8")
        page = re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)
        path.write_text(page, encoding="utf-8")
        plot(rows, machine, DOCS / "planning.png")


def table(rows: Sequence[Published], machine: Machine, left_out: dict[str, float]) -> str:
    """Return predicted against published as Markdown."""
    lines = [
        "| row | GPUs | layout | published tok/s/GPU | predicted | error | error when left out | source | assumed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        unfitted = f"sets {row.sets}" if row.sets else "never fitted"
        left = f"{100 * left_out[row.name]:+.1f} %" if row.fitted else unfitted
        measured, predicted = row.tokens_per_s_per_gpu, row.predicted(machine)
        lines.append(
            f"| {row.name} | {row.layout.gpus} | {row.layout} | {measured:.0f} | {predicted:.0f} |"
            f" {100 * (predicted / measured - 1):+.1f} % | {left} | {row.source} | {row.assumed} |"
        )
    groups = (
        ("Fitted rows", [abs(error(row, machine)) for row in rows if row.fitted]),
        ("Each fitted row left out of its own fit", [abs(miss) for miss in left_out.values()]),
        ("Rows never fitted", [abs(error(row, machine)) for row in rows if not row.fitted and not row.sets]),
    )
    lines.append("")
    for name, misses in groups:
        lines.append(
            f"{name}: median error {100 * statistics.median(misses):.1f} %, worst {100 * max(misses):.1f} %.  "
        )
    return "\n".join(lines)


def plot(rows: Sequence[Published], machine: Machine, path: Path) -> None:
    """Draw predicted over published tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5.2))
    span = [200, 20000]
    axes.plot(span, span, color="grey", linewidth=1)
    axes.fill_between(span, [0.75 * x for x in span], [1.25 * x for x in span], color="grey", alpha=0.15, label="25 %")
    for fitted, marker in ((True, "o"), (False, "x")):
        chosen = [row for row in rows if row.fitted is fitted]
        x = [row.tokens_per_s_per_gpu for row in chosen]
        y = [row.predicted(machine) for row in chosen]
        axes.scatter(x, y, marker=marker, label="fitted" if fitted else "never fitted")
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, xlabel="published tokens/s/GPU", ylabel="predicted")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
