"""`--without-nemo` runs no test that imports NeMo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.without_nemo import NEMO


TESTS = """
import sys


def test_a_function():
    import lightning.pytorch


def test_what_is_missing_for_another_reason():
    import no_such_module


def test_nothing_was_imported():
    assert not [name for name, module in sys.modules.items() if module and name.split(".")[0] in NAMES]
"""


def test_no_test_imports_nemo_without_it(tmp_path: Path) -> None:
    (tmp_path / "test_later.py").write_text(TESTS.replace("NAMES", str(NEMO)))
    (tmp_path / "test_at_import.py").write_text("import nemo_upcycle.pipeline.nemo.recipes\n")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options = ["-p", "tests.conftest", "-p", "no:cacheprovider", "--without-nemo", "--rootdir", str(tmp_path)]
    command = [sys.executable, "-m", "pytest", *options, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=variables, capture_output=True, text=True)
    assert "1 failed, 1 passed, 2 skipped" in done.stdout, done.stdout
    assert "No module named 'no_such_module'" in done.stdout
