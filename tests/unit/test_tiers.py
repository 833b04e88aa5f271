"""What `make check` and `make test` run: no import of NeMo in the one, parts that cover their tables in the other."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.tiers import every_pair, every_value
from tests.without_nemo import NEMO


TESTS = """
import sys


def test_a_function():
    import lightning.pytorch


def test_ranks():
    from tests.distributed.ranks import run_ranks

    run_ranks(print, 1)


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
    assert "1 failed, 1 passed, 3 skipped" in done.stdout, done.stdout
    assert "No module named 'no_such_module'" in done.stdout


def _kept(rows: list[Any]) -> list[tuple[Any, ...]]:
    assert {mark.name for row in rows for mark in row.marks} == {"full", "weekly"}
    return [row.values for row in rows if not row.marks]


def test_rows_that_are_kept_hold_every_pair_or_every_value() -> None:
    axes = ("abcd", [{}, {"a": 1}], (1, 2, 4))
    kept = _kept(every_pair(*axes))
    assert len(kept) == 12
    for one, other in itertools.combinations(range(3), 2):
        for pair in itertools.product(axes[one], axes[other]):
            assert any((row[one], row[other]) == pair for row in kept), pair
    assert _kept(every_value("ab", range(3))) == [("a", 0), ("a", 2), ("b", 1)]
