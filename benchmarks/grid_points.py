"""Write points.csv beside the evidence of a grid that trains its parents: what the law of what pays is fitted to.

python -m benchmarks.grid_points docs/results/budget
"""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.evaluation.compare import jackknife_stderr, left_out
from nemo_upcycle.evaluation.heldout import METRIC, bits_per_byte
from nemo_upcycle.reporting.grid import arms_of
from nemo_upcycle.reporting.grid_evidence import EVIDENCE, read_evidence


#: A row for each training that is the point of a curve.
COLUMNS = (
    *("option", "parent_tokens", "tokens", "experts", "topk", "granularity", "active_parameters", "total_parameters"),
    *("training_flops", "seed", "loss", "loss_stderr", "bits_per_byte", "start_loss", "steps", "arm"),
    "schedule",
)


def option_of(cell: Mapping[str, Any]) -> str:
    """Name what a training of a curve is: `dense` or `moe`, `dense_from_nothing` or `moe_from_nothing`."""
    kind = "dense" if cell["experts"] == 1 else "moe"
    return kind if cell["parent_tokens"] else f"{kind}_from_nothing"


def points_csv(evidence: Mapping[str, Any]) -> str:
    """Write a line for each training that is the point of a curve; losses are nats a token of the grid's tokenizer.

    Args:
        evidence: what `collect_evidence` or `read_evidence` returned.

    Returns:
        The CSV file.
    """
    arms = arms_of(evidence)
    nats = math.log(2) * evidence["heldout"]["bytes"] / evidence["heldout"]["tokens"]
    text = io.StringIO()
    rows = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    rows.writeheader()
    for cell in filter(_is_point, evidence["described"]["cells"].values()):
        arm, tokens = arms[cell["arm"]], cell["steps"] * cell["tokens_per_step"]
        sums = arm.scores.get(tokens, {}).get(cell["seed"])
        if sums is None:  # what was no number
            continue
        stderr = jackknife_stderr(left_out(METRIC, list(sums.values())))
        known = {
            "option": option_of(cell),
            "tokens": tokens,
            "training_flops": tokens * arm.flops_per_token,
            "loss": bits_per_byte(sums) * nats,
            "loss_stderr": None if stderr is None else stderr * nats,
            "bits_per_byte": bits_per_byte(sums),
            "start_loss": bits_per_byte(arm.scores[0][cell["seed"]]) * nats if cell["seed"] in arm.scores[0] else None,
        }
        rows.writerow(dict(cell) | known)
    return text.getvalue()


def _is_point(cell: Mapping[str, Any]) -> bool:
    return bool(cell.get("is_length"))


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"a folder with {EVIDENCE}")
    folder = parser.parse_args().folder
    (folder / "points.csv").write_text(points_csv(read_evidence(folder / EVIDENCE)), encoding="utf-8")


if __name__ == "__main__":
    main()
