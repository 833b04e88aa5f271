"""What `make check` and `make test` run: no import of NeMo in the one, parts that cover their tables in the other."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiers import every_pair, every_value, quick
from tests.without_nemo import NEMO, ROOT, imports_nemo


#: Texts of files that import NeMo as they are imported, or start a program that does; and of others.
AT_IMPORT = {
    "itself": "import nemo\n",
    "a part": "from lightning.pytorch import Trainer\n",
    "under a condition": "if True:\n    with quiet():\n        from nemo_run import Config\n",
    "through the package": "from nemo_upcycle.trainers.nemo import retention\n",
    "through a recipe": "import nemo_upcycle.recipes.table\n",
    "through tests": "from tests.functional.soak import STEPS\n",
    "by a class": "class Callback:\n    import lightning.pytorch as pl\n",
    "in a program": 'CODE = """\nimport sys\nimport nemo_run\n"""\n',
    "in a program of a test": 'def test_a() -> None:\n    start("""\n        import nemo\n    """)\n',
}
LATER = {
    "nothing": "import torch\n",
    "a like name": "import nemo_upcycle\nimport lightning_utilities\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import nemo_run\n",
    "in a function": "def test_a() -> None:\n    import nemo_run\n",
    "in a function of the package": "from nemo_upcycle.cpu.backend import use_cpu_backend\n",
    "on ranks": "from tests.distributed.ranks import run_ranks\n",
}


@pytest.mark.parametrize("case", AT_IMPORT)
def test_a_file_that_imports_nemo_is_told_by_its_source(tmp_path: Path, case: str) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(AT_IMPORT[case])
    assert imports_nemo(path)


@pytest.mark.parametrize("case", LATER)
def test_a_file_that_imports_nemo_later_is_kept(tmp_path: Path, case: str) -> None:
    path = tmp_path / "test_it.py"
    path.write_text(LATER[case])
    assert not imports_nemo(path)


def test_most_rooms_are_in_make_check() -> None:
    files = {path: imports_nemo(path) for path in (ROOT / "tests/unit").rglob("test_*.py")}
    light = {path.parent.name for path, is_heavy in files.items() if not is_heavy}
    assert light >= {"cli", "convert", "evaluation", "init", "models", "online", "planning", "sources", "verify"}
    assert files[ROOT / "tests/unit/pipeline/test_chain.py"]


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
    (tmp_path / "test_at_import.py").write_text("raise AssertionError\nimport nemo_run\n")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--without-nemo", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert "1 failed, 2 passed, 3 skipped" in done.stdout, done.stdout
    assert "No module named 'no_such_module'" in done.stdout


def test_make_check_runs_without_nemo() -> None:
    options = re.search(r"^CHECK := (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert options
    assert "--without-nemo" in options[1].split()


def _kept(rows: list[Any]) -> list[tuple[Any, ...]]:
    return [row.values for row in rows if not row.marks]


def test_rows_that_are_kept_hold_every_pair_and_the_others_are_weekly() -> None:
    axes = ("abcd", [{}, {"a": 1}], (1, 2, 4))
    rows = every_pair(*axes)
    assert [row.values for row in rows] == list(itertools.product(*axes))
    kept = _kept(rows)
    assert len(kept) == 12
    for one, other in itertools.combinations(range(3), 2):
        for pair in itertools.product(axes[one], axes[other]):
            assert any((row[one], row[other]) == pair for row in kept), pair
    assert kept == _kept(every_pair(*axes))
    assert {mark.name for row in rows for mark in row.marks} == {"full", "weekly"}


def test_rows_that_are_kept_hold_every_value() -> None:
    rows = every_value("abc", range(7))
    assert len(rows) == 21
    kept = _kept(rows)
    assert len(kept) == 7
    assert {row[0] for row in kept} == set("abc")


def test_a_row_to_keep_must_be_there() -> None:
    assert _kept(quick([(1, {}), (2, {"ep": 2})], (2, {"ep": 2}))) == [(2, {"ep": 2})]
    with pytest.raises(AssertionError):
        quick([1, 2], 3)
