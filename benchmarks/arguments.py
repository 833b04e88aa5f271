"""The arguments of a benchmark: `--help`, and the names of cases to measure."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence


def chosen(doc: str | None, words: Sequence[str], known: Iterable[str] = ()) -> list[str]:
    """Return the names that a command line chooses; an empty list means all.

    Args:
        doc: text for `--help`.
        words: arguments of the benchmark.
        known: all valid names; empty if the benchmark takes no names.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(known)
    if names:
        parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(names)} (default: all)")
    found: list[str] = getattr(parser.parse_args(words), "names", [])
    if unknown := [name for name in found if name not in names]:
        parser.error(f"unknown name {unknown[0]}. Valid: {', '.join(names)}.")
    return found
