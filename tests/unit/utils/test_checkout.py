"""Importing has no side effects; an error names a checkout that is not installed, or another clone's environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.utils.conf import packaged


ROOT = Path(__file__).parents[3]
INSTALLED = pytest.mark.skipif(
    packaged("data").parent != ROOT / "conf", reason="the package is not installed from this checkout"
)


def _python(code: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *options, "-c", code]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another checkout, used as the current folder."""
    for name in ("nemo_upcycle", "recipes", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_importing_the_package_only_imports(tmp_path: Path) -> None:
    code = """if True:
        import signal, sys
        sys.argv = ["/usr/bin/nemo-upcycle", "upcycle", "pipeline"]
        def state():
            return sys.argv[:], sys.meta_path[:], [signal.getsignal(one) for one in signal.valid_signals()]
        before = state()
        import nemo_upcycle
        assert state() == before
        from nemo_upcycle import UpcycleSpec
        assert state() == before, UpcycleSpec(num_experts=8, top_k=2)
    """
    done = _python(code, tmp_path)
    assert done.returncode == 0, done.stderr


@INSTALLED
@pytest.mark.slow
def test_another_clones_environment_is_named_with_the_fix(other: Path) -> None:
    command = [Path(sys.executable).with_name("nemo-upcycle"), "doctor"]
    environment = os.environ | {"PYTHONPATH": str(other)}
    found = subprocess.run(command, env=environment, cwd=other, capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert f"nemo_upcycle.recipes comes from {ROOT / 'recipes'}" in found.stderr
    assert f"pip install -e {other}" in found.stderr
    assert "Traceback" not in found.stderr


@INSTALLED
def test_beside_another_clones_environment_only_recipes_are_refused(other: Path) -> None:
    done = _python("import nemo_upcycle as n; print(n.__file__); import nemo_upcycle.recipes", other)
    assert done.stdout.strip() == str(other / "nemo_upcycle/__init__.py")
    last = done.stderr.splitlines()[-1]
    assert "CheckoutError: nemo_upcycle.recipes comes from " in last
    assert last.endswith(f"or pip install -e {other}.")


@pytest.mark.parametrize("part", ["recipes", "conf"])
def test_a_checkout_that_is_not_installed_says_how_to(other: Path, part: str) -> None:
    code = f"try:\n import nemo_upcycle, nemo_upcycle.{part}\nexcept ImportError as error:\n print(error)"
    done = _python(code, other, "-S")  # without the installed packages
    text = f"nemo_upcycle.{part} is in the checkout {other}, which is not installed."
    assert done.stdout.strip() == f"{text} Run: pip install -e {other}.", done.stderr
