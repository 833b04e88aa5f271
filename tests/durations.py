"""Runs the longest test files first, so that no xdist worker is still busy with a long file at the end.

make test PYTEST_ADDOPTS=--junitxml=runs/test.xml
python -m tests.durations runs/test.xml ...         records the duration of each file in durations.json

If several reports list a file, for example one report per trainer, the longest duration counts.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

import pytest


RECORDED = Path(__file__).with_suffix(".json")


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests in place by the duration of their file, longest first; unrecorded files come first of all."""
    seconds = json.loads(RECORDED.read_text(encoding="utf-8"))
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], math.inf))


def record(reports: Iterable[Path]) -> None:
    """Record the duration (s) of each test file in pytest's reports."""
    longest: Counter[str] = Counter()
    for report in reports:
        seconds: Counter[str] = Counter()
        for case in ElementTree.parse(report).iter("testcase"):
            seconds[case.attrib["classname"].replace(".", "/") + ".py"] += float(case.attrib["time"])
        longest |= seconds
    rounded = {name: round(took, 1) for name, took in sorted(longest.items()) if name != ".py"}
    RECORDED.write_text(json.dumps(rounded, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record(map(Path, sys.argv[1:]))
