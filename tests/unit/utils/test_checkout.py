"""A checkout that is used with the environment of another one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.utils.conf import packaged


ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(packaged("data").parent != ROOT / "conf", reason="the package is not installed from this checkout")
def test_a_clone_with_another_clones_environment_is_named_with_the_fix(tmp_path: Path) -> None:
    for name in ("nemo_upcycle", "recipes", "conf"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [Path(sys.executable).with_name("nemo-upcycle"), "doctor"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert f"nemo_upcycle.recipes: got {ROOT / 'recipes'}" in found.stderr
    assert f"pip install -e {tmp_path}" in found.stderr
    assert "Traceback" not in found.stderr
