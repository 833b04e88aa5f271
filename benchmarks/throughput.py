"""Fit the planner's throughput model to published rows, and write the tables and the plot of results/planner.md.

    python -m benchmarks.throughput            predictions with the constants of the package, leave-one-out errors
    python -m benchmarks.throughput --fit      fit the constants again and print them
    python -m benchmarks.throughput --write    write the tables and the plot into benchmarks/results/planner.md

The fit is least squares on the logarithm of predicted over published tokens/s, with a weak pull towards the starting
values.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.published import Peak, Published, published_peaks, published_rows
from nemo_upcycle.planning.hardware import SOFTWARE, Machine, known_gpu


#: Fitted constants and their starting values: for the H100, and for all Blackwell cards together. All other constants
#: are fixed.
HOPPER = {"gemm": 0.6, "gemm_fp8": 0.55, "moe_us": 600.0, "imbalance": 1.1}
BLACKWELL = {
    "gemm": 0.65,
    "gemm_fp8": 0.55,
    "gemm_fp4": 0.45,
    "ragged": 0.8,
    "attention": 0.5,
    "uneven_mx_expert_us": 400.0,
}
#: Weight of the pull towards the starting values. A constant that differs from its start by a factor e costs as much
#: as an error of 14 %.
PULL = 0.02
PAGE = Path(__file__).parent / "results/planner.md"


def fit(rows: Sequence[Published], start: dict[str, float]) -> dict[str, float]:
    """Return the constants whose predictions are closest to the rows."""
    from scipy.optimize import minimize

    def values(logs: Sequence[float]) -> dict[str, float]:
        return {name: first * math.exp(log) for (name, first), log in zip(start.items(), logs, strict=True)}

    def cost(logs: Sequence[float]) -> float:
        misses = [math.log(row.predicted(values(logs)) / row.tokens_per_s_per_gpu) for row in rows]
        return sum(miss * miss for miss in misses) + PULL * sum(log * log for log in logs)

    options = {"xtol": 1e-3, "ftol": 1e-7, "maxiter": 2000}
    return values(minimize(cost, [0.0] * len(start), method="Powell", options=options).x)


def error(row: Published, reached: dict[str, float] | None = None) -> float:
    """Return the relative error of the prediction with all settings of the source."""
    return row.predicted(reached) / row.tokens_per_s_per_gpu - 1


def error_as_asked(row: Published) -> float:
    """Return the relative error of `predicted_as_asked`."""
    return row.predicted_as_asked() / row.tokens_per_s_per_gpu - 1


def main() -> None:
    """Print the tables, and write them with --write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = published_rows()
    hopper = [row for row in rows if row.fitted and not row.gpu.is_blackwell]
    if args.fit:
        blackwell = [row for row in rows if row.fitted and row.gpu.is_blackwell]
        for name, fitted, start in (("h100", hopper, HOPPER), ("blackwell", blackwell, BLACKWELL)):
            print(name, {key: float(f"{value:.3g}") for key, value in fit(fitted, start).items()})
    left_out = {row.name: error(row, fit([one for one in hopper if one is not row], HOPPER)) for row in hopper}
    texts = {"throughput table": table(rows, left_out), "memory table": memory_table(published_peaks())}
    texts["constants table"] = constants_table()
    print("\n\n".join(texts.values()))
    if args.write:
        page = PAGE.read_text(encoding="utf-8")
        for name, text in texts.items():
            page = placed(page, name, text)
        PAGE.write_text(page, encoding="utf-8")
        plot(rows, PAGE.with_suffix(".png"))


def placed(page: str, name: str, text: str) -> str:
    """Return a page with new text between the marks of a table."""
    begin, end = f"<!-- {name} -->", "<!-- end of table -->"
    head, _, rest = page.partition(begin)
    return f"{head}{begin}\n{text}\n{end}{rest.partition(end)[2]}"


def table(rows: Sequence[Published], left_out: dict[str, float]) -> str:
    """Return a table of predicted and published throughput as Markdown."""
    lines = [
        "| row | card | GPUs | layout | published tok/s/GPU | as told | as asked | left out | source | assumed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        role = "fitted" if row.fitted else "never fitted"
        role = f"sets {row.sets}" if row.sets else role
        role = f"{100 * left_out[row.name]:+.1f} %" if row.name in left_out else role
        errors = f"{100 * error(row):+.1f} % | {100 * error_as_asked(row):+.1f} %"
        lines.append(
            f"| {row.name} | {row.card} | {row.layout.gpus} | {row.layout} | {row.tokens_per_s_per_gpu:.0f} |"
            f" {errors} | {role} | {row.source} | {row.assumed} |"
        )
    lines += ["", "| rows | number | | median error | worst | too high |", "|---|---|---|---|---|---|"]
    kinds = {
        "fitted": [row for row in rows if row.fitted],
        "never fitted, setting nothing": [row for row in rows if row.is_unseen],
    }
    for card in dict.fromkeys(row.card for row in rows):
        for kind, every in kinds.items():
            chosen = [row for row in every if row.card == card]
            if not chosen:
                continue
            for told, misses in (
                ("as told", [error(row) for row in chosen]),
                ("as asked", [error_as_asked(row) for row in chosen]),
            ):
                lines.append(f"| {card}, {kind} | {len(chosen)} | {told} | {_summary(misses)} |")
    lines.append(
        f"| H100, each fitted row left out of its own fit | {len(left_out)} | | {_summary(left_out.values())} |"
    )
    return "\n".join(lines)


def constants_table() -> str:
    """Return a table of the throughput model's constants as Markdown, by card and by generation of software."""
    blackwell = known_gpu("b200").reached
    later = {name: values for name, values in SOFTWARE.items() if values}
    lines = [f"| constant | H100 | Blackwell | {' | '.join(later)} |", "|---|" + "---|" * (2 + len(later))]
    for one in fields(Machine):
        values = [one.default, blackwell.get(one.name, ""), *(values.get(one.name, "") for values in later.values())]
        lines.append(f"| `{one.name}` | {' | '.join(f'{value:g}' if value else '' for value in values)} |")
    return "\n".join(lines)


def _summary(misses: Iterable[float]) -> str:
    values = list(misses)
    sizes = [100 * abs(miss) for miss in values]
    high = sum(miss > 0 for miss in values)
    return f"{statistics.median(sizes):.1f} % | {max(sizes):.1f} % | {high} of {len(values)}"


def memory_table(peaks: Sequence[Peak]) -> str:
    """Return a table of predicted and measured memory as Markdown."""
    lines = [
        "| run | GPUs | layout | | measured GiB | predicted | error | source | assumed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for peak in peaks:
        row, (states, highest) = peak.row, peak.predicted()
        for kind, measured, predicted in (
            ("allocated", peak.allocated_gib, states),
            ("peak", peak.peak_gib, highest),
        ):
            if measured is not None:
                lines.append(
                    f"| {row.name} | {row.layout.gpus} | {row.layout} | {kind} | {measured:.2f} | {predicted:.2f} |"
                    f" {100 * (predicted / measured - 1):+.1f} % | {row.source} | {row.assumed} |"
                )
    return "\n".join(lines)


def plot(rows: Sequence[Published], path: Path) -> None:
    """Plot predicted against published tokens/s."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 5.2))
    span = [200, 50000]
    axes.plot(span, span, color="grey", linewidth=1)
    axes.fill_between(span, [0.75 * x for x in span], [1.25 * x for x in span], color="grey", alpha=0.15, label="25 %")
    for fitted, marker in ((True, "o"), (False, "x")):
        chosen = [row for row in rows if row.fitted is fitted]
        x = [row.tokens_per_s_per_gpu for row in chosen]
        y = [row.predicted() for row in chosen]
        axes.scatter(x, y, marker=marker, label="fitted" if fitted else "never fitted")
    axes.set(xscale="log", yscale="log", xlim=span, ylim=span, xlabel="published tokens/s/GPU", ylabel="predicted")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
