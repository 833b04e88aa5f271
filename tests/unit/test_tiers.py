"""What `make check` and `make test` run: no import of NeMo in the one, parts that cover their tables in the other."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiers import every_pair, every_value, quick
from tests.without_nemo import NEMO


TESTS = """
import sys
from importlib.util import find_spec

import pytest


@pytest.fixture
def recipe():
    from nemo_upcycle.recipes import llama3_8b_e8t2

    return llama3_8b_e8t2


def test_a_fixture(recipe): ...


def test_a_function():
    import lightning.pytorch


def test_ranks():
    from tests.distributed.ranks import run_ranks

    run_ranks(print, 1)


def test_what_looks_for_it_finds_nothing():
    assert [find_spec(name) for name in NAMES] == [None, None, None]


def test_what_is_missing_for_another_reason():
    import no_such_module


def test_nothing_was_imported():
    assert not [name for name, module in sys.modules.items() if module and name.split(".")[0] in NAMES]
"""


def test_no_test_imports_nemo_without_it(tmp_path: Path) -> None:
    (tmp_path / "test_later.py").write_text(TESTS.replace("NAMES", str(NEMO)))
    (tmp_path / "test_at_import.py").write_text("import nemo_upcycle.recipes.table\n")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--without-nemo", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=variables, capture_output=True, text=True)
    assert "1 failed, 2 passed, 4 skipped" in done.stdout, done.stdout
    assert "No module named 'no_such_module'" in done.stdout


def _kept(rows: list[Any]) -> list[tuple[Any, ...]]:
    assert {mark.name for row in rows for mark in row.marks} == {"full", "weekly"}
    return [row.values for row in rows if not row.marks]


def test_rows_that_are_kept_hold_every_pair_or_every_value() -> None:
    axes = ("abcd", [{}, {"a": 1}], (1, 2, 4))
    rows = every_pair(*axes)
    assert [row.values for row in rows] == list(itertools.product(*axes))
    kept = _kept(rows)
    assert len(kept) == 12
    for one, other in itertools.combinations(range(3), 2):
        for pair in itertools.product(axes[one], axes[other]):
            assert any((row[one], row[other]) == pair for row in kept), pair
    assert _kept(every_value("ab", range(3))) == [("a", 0), ("a", 2), ("b", 1)]


def test_a_row_to_keep_must_be_there() -> None:
    assert _kept(quick([(1, {}), (2, {"ep": 2})], (2, {"ep": 2}))) == [(2, {"ep": 2})]
    with pytest.raises(AssertionError):
        quick([1, 2], 3)
