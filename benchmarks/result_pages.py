"""Write the numbers that pages cite from the tables of grids again, each from its cell.

    python -m benchmarks.result_pages          docs/results/*.md, docs/*.md, README.md
    python -m benchmarks.result_pages --check  only names what differs; status 1 where anything does

A cited number is followed by a comment that names its grid and its cell of docs/results/GRID/table.json:
`-0.0261 ± 0.0035 (better)<!--laptop moe.end-->` is a difference (below `differences`), and `2.029<!--laptop
arms.moe.start.value-->` a number, rounded to the digits that are written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from nemo_upcycle.reporting.markdown import with_verdict


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
#: What is cited: a number, or a difference with its interval and verdict; and the grid and cell.
CITED = re.compile(r"([+-]?[\d.]+(?:e-\d+)?)( ± [\d.e-]+)?( \([a-z ]+\))?<!--(\w+) ([\w.]+)-->")


def pages() -> list[Path]:
    """List the pages that may cite a grid."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(RESULTS.glob("*.md"))]


@cache
def _table(grid: str) -> dict[str, Any]:
    table: dict[str, Any] = json.loads((RESULTS / grid / "table.json").read_text(encoding="utf-8"))
    return table


def cell_of(grid: str, path: str) -> Any:
    """Read a cell of a grid's table.

    Args:
        grid: name of a folder of docs/results.
        path: keys with dots between them; from `arms` on, or else below `differences`.

    Raises:
        KeyError: there is no such cell.
    """
    cell: Any = _table(grid) if path.startswith("arms.") else _table(grid)["differences"]
    for key in path.split("."):
        cell = cell[int(key)] if isinstance(cell, list) else cell[key]
    return cell


def with_cells(text: str) -> str:
    """Write every cited number of a page from its cell."""

    def written(cited: re.Match[str]) -> str:
        number, _, _, grid, path = cited.groups()
        cell = cell_of(grid, path)
        if isinstance(cell, dict):
            shown = with_verdict(cell)
        else:
            sign = "+" if path.endswith("difference") else ""
            shown = f"{cell:{sign}.{len(number.partition('.')[2])}f}"
        return f"{shown}<!--{grid} {path}-->"

    return CITED.sub(written, text)


def main() -> None:
    """Write the pages, or name those that differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    differing = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (cited := with_cells(text)) != text:
            differing.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(cited, encoding="utf-8")
    print("\n".join(differing))
    sys.exit(check and bool(differing))


if __name__ == "__main__":
    main()
