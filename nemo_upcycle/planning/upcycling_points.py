"""Points that a law is fitted to: one training each, from a grid's points.csv."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.planning.law import shape_name
from nemo_upcycle.utils.files import read_text


#: Of the column `option`.
OPTIONS = ("dense", "moe", "moe_from_nothing", "dense_from_nothing")
_NUMBERS = ("parent_tokens", "tokens", "experts", "topk", "granularity", "total_parameters", "seed", "loss")
FILE = "points.csv"
_MOST = 1e18  # larger numbers are mistakes


@dataclass(frozen=True)
class Point:
    """A training.

    Args:
        option: name of its option in a `Law`: `dense`, `dense_from_nothing`, `upcycled_e8t2`,
            `moe_from_nothing_e8t2`.
        parent_tokens: that its parent was trained on; 0 without one.
        tokens: of this training.
        parameters: of the model, all of them.
        seed: trainings of one seed see the same data in the same order.
        loss: held-out, in nats a token.
    """

    option: str
    parent_tokens: float
    tokens: float
    parameters: float
    seed: int
    loss: float


def points_file(path: str | Path) -> Path:
    """Return the file with a grid's points: the path itself, or `points.csv` in the folder or in its `table/`.

    Raises:
        UpcycleError: there is none.
    """
    given = Path(path).expanduser()
    for file in (given, given / FILE, given / "table" / FILE):
        if file.is_file():
            return file
    fix = "name the folder of a grid that is done, or its points.csv"
    raise UpcycleError(f"grid {given}", got="no points.csv", expected="a grid's folder, or the file", fix=fix)


def read_points(path: str | Path) -> list[Point]:
    """Return the trainings of a grid.

    Args:
        path: of the file, or of a folder that has it. One row a training, with at least the columns `option`,
            `parent_tokens`, `tokens`, `experts`, `topk`, `granularity`, `total_parameters`, `seed` and `loss`.

    Raises:
        UpcycleError: there is no such file, a column is missing, a value is none, or a training has two rows.
    """
    file = points_file(path)
    reader = csv.DictReader(read_text(file).splitlines())
    missing = [name for name in ("option", *_NUMBERS) if name not in (reader.fieldnames or ())]
    if missing:
        got = f"no column {', '.join(missing)}"
        fix = "let the grid write it, or add the column"
        raise UpcycleError(str(file), got=got, expected="one row a training, with these columns", fix=fix)
    points = [_point(f"{file}, line {reader.line_num}", row) for row in reader]
    if not points:
        raise UpcycleError(str(file), got="no rows", expected="one row a training", fix="run the grid first")
    trainings = Counter((one.option, one.parent_tokens, one.tokens, one.seed) for one in points)
    (option, parent, tokens, seed), count = trainings.most_common(1)[0]
    if count > 1:
        which = f"{file}: {option}, {parent:,.0f} + {tokens:,.0f} tokens, seed {seed}"
        fix = "keep one: a trial with other settings is no seed"
        raise UpcycleError(which, got=f"{count} rows", expected="one row a training", fix=fix)
    return points


def _point(where: str, row: Mapping[str, str]) -> Point:
    option = row["option"]
    if option not in OPTIONS:
        raise UpcycleError.unknown("option", option, OPTIONS).within(where)
    values = {name: _number(where, name, row[name]) for name in _NUMBERS}
    if (values["parent_tokens"] > 0) == option.endswith("from_nothing"):
        expected = "0 of an option from nothing, else above 0"
        raise UpcycleError(
            f"{where}: parent_tokens of {option}", got=row["parent_tokens"], expected=expected, fix="correct the cell"
        )
    if option.startswith("moe"):
        shape = shape_name(*(int(values[name]) for name in ("experts", "topk", "granularity")))
        option = f"upcycled_{shape}" if option == "moe" else f"{option}_{shape}"
    sizes = (values["parent_tokens"], values["tokens"], values["total_parameters"])
    return Point(option, *sizes, int(values["seed"]), values["loss"])


def _number(where: str, name: str, text: str | None) -> float:
    """Return a cell's number: above 0, but of `parent_tokens` and `seed` also 0; whole, but of `loss`."""
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    may_be_zero, is_loss = name in ("parent_tokens", "seed"), name == "loss"
    if (value > 0 or (value == 0 and may_be_zero)) and value <= _MOST and (is_loss or value.is_integer()):
        return value
    expected = f"a {'' if is_loss else 'whole '}number{', 0 or more' if may_be_zero else ' above 0'}"
    raise UpcycleError(f"{where}: {name}", got=repr(text), expected=expected, fix="correct the cell")
