"""Lets the test files that take longest run first, so that no worker of xdist is left alone with one at the end.

make test PYTEST_ADDOPTS=--junitxml=runs/test.xml
python -m tests.durations runs/test.xml ...         records in durations.json how long each takes

A file of several reports, as one of both trainers, takes as long as in the slowest.
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
    """Order tests by what their files take, in place; a file that is not recorded comes first."""
    seconds = json.loads(RECORDED.read_text(encoding="utf-8"))
    items.sort(key=lambda item: -seconds.get(item.nodeid.partition("::")[0], math.inf))


def record(reports: Iterable[Path]) -> None:
    """Write the seconds of each file of pytest's reports."""
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
