"""Fit the law of what pays to a grid's points, and write conf/planning/upcycling_law.yaml.

    python -m benchmarks.upcycling_law docs/results/budget          print the law
    python -m benchmarks.upcycling_law docs/results/budget --write  and write it, as `nemo-upcycle advise` reads it

The printed tables are Markdown.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

from benchmarks.law_fit import ALIKE, DRAWS, fit_law, read_points
from nemo_upcycle.planning.law import Law


LAW = Path(__file__).resolve().parent.parent / "conf/planning/upcycling_law.yaml"
HEADER = """\
# The law of what pays, fitted by `python -m benchmarks.upcycling_law {path} --write`; the keys are explained in these
# lines. source: its points. options: of each the form (planning/law.py has the formulas), its coefficients in nats a
# token and their 90 % intervals, the lowest and highest parent_tokens, tokens and parameters (of the parent) among the
# points, {draws} draws of the bootstrap over seeds in the order of the coefficients, error: half of the 90 % interval
# of held-out differences to `dense`, held_out: root mean square error of each form on parents left out of the fit,
# others: the coefficients of the other forms whose error is at most {alike:g} times that of the chosen one.
# left_out: why an option has no law though some trainings of it are there.
"""

#: The formulas of `planning.law.FORMS`.
TEXTS = {
    "interaction": "A * D1^-a * D2^(-b + c ln D1) + E",
    "product": "A * D1^-a * D2^-b + E",
    "additive": "A * D1^-a + B * D2^-b + E",
    "sum": "A * (D2 + e^w D1)^-a + E",
    "difference": "loss of dense + P ln D1 + Q ln D2 + E",
    "power": "A * D2^-a + E",
}


def main() -> None:
    """Fit, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", type=Path, help="a folder with points.csv")
    parser.add_argument("--about", default="the parents of docs/results/budget.md", help="what was trained")
    parser.add_argument("--write", action="store_true", help=f"write {LAW.name}")
    args = parser.parse_args()
    points = read_points(args.grid / "points.csv")
    law = fit_law(points, args.about, str(args.grid / "points.csv"))
    print(table(law))
    for option, why in law.left_out.items():
        print(f"{option} is left out: {why}\n")
    if args.write:
        LAW.write_text(law_yaml(law, str(args.grid)), encoding="utf-8")


def law_yaml(law: Law, path: str) -> str:
    """Return a law as its file has it."""
    options = {name: _plain(vars(option)) for name, option in law.options.items()}
    values = {"about": law.about, "source": law.source, "options": options, "left_out": dict(law.left_out)}
    text = yaml.safe_dump(values, sort_keys=False, default_flow_style=None, width=128)
    return HEADER.format(path=path, draws=DRAWS, alike=ALIKE) + text


def _plain(value: Any) -> Any:
    """Return a value as YAML writes it, floats with seven digits."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def table(law: Law) -> str:
    """Return the chosen forms, their coefficients, and the held-out errors of all forms."""
    lines = ["| option | form | coefficients (90 % interval) | held-out error of each form |", "|---|---|---|---|"]
    for name, option in law.options.items():
        shown = "; ".join(
            f"{key} {value:.4g} ({option.intervals[key][0]:.3g} to {option.intervals[key][1]:.3g})"
            for key, value in option.coefficients.items()
        )
        errors = ", ".join(f"{form} {error:.4f}" for form, error in option.held_out.items())
        lines.append(f"| {name} | {option.form}: {TEXTS[option.form]} | {shown} | {errors} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
