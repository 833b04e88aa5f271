"""NeMo's folders can be deleted, and everything else works with Megatron-Bridge."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.package_copy import copy_without_nemo


#: Import every module whose libraries are installed here, and print the recipe files that were imported. The module
#: behind `nemo` is omitted: it checks whether NeMo is installed, and NeMo is installed here.
IMPORTS = """
import importlib, pkgutil, sys
from nemo_upcycle import __path__

for module in pkgutil.walk_packages(__path__, "nemo_upcycle."):
    if "__main__" not in module.name and "nemo_command" not in module.name:
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            if "No module named 'nemo_upcycle" in str(error):
                raise
print([module.__file__ for name, module in sys.modules.items() if name.startswith("nemo_upcycle.recipes.")])
"""


@pytest.mark.full
def test_all_else_imports_without_the_folders_of_nemo(tmp_path: Path) -> None:
    tree = copy_without_nemo(tmp_path)
    ran = _run(tree, "-c", IMPORTS)
    assert ran.returncode == 0, ran.stderr
    imported = {Path(file).relative_to(tree / "nemo_upcycle/recipes").name for file in ast.literal_eval(ran.stdout)}
    assert imported == {file.name for file in (tree / "nemo_upcycle/recipes").glob("[a-z]*.py")}


def test_a_plan_prints_bridges_command_without_the_folders_of_nemo(tmp_path: Path) -> None:
    asked = [
        "-m",
        "nemo_upcycle.cli",
        "plan",
        "--recipe",
        "llama3_8b_e8t2",
        "--gpus",
        "64",
        "--gpu",
        "h100",
        "--backend",
    ]
    tree = copy_without_nemo(tmp_path)
    ran = _run(tree, *asked, "bridge")
    assert ran.returncode == 0, ran.stderr
    assert "-m nemo_upcycle.bridge" in ran.stdout
    refused = _run(tree, *asked, "nemo")
    assert refused.returncode == 2
    assert "bridge" in refused.stderr


def _run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=tree, env={"PYTHONPATH": str(tree), "PATH": "", "HOME": str(tree)}, capture_output=True, text=True
    )
