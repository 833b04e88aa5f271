"""Megatron can be imported with a CUDA build of torch on a machine without a GPU."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[3]
TRAINERS = ("megatron", "nemo")

# torch's CUDA build fails like this without a GPU. Its CPU build raises an error that Megatron expects.
_CODE = """
from torch.utils import cpp_extension
cpp_extension.load_inline = lambda *_, **__: [][-1]
from megatron.core.inference import unified_memory
print(unified_memory.has_unified_memory)
"""


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_megatron_is_imported_with_this_package_and_not_without() -> None:
    alone, ours = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        for code in ("import nemo_upcycle" + _CODE, "from nemo_upcycle import upcycle_into" + _CODE)
    )
    assert "IndexError" in alone.stderr, "Megatron has fixed it: this package's part can go"
    assert ours.stdout.split() == ["False"], ours.stderr


def _imports_a_trainer(path: Path) -> bool:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.append(node.module)
    return any(name.partition(".")[0] in TRAINERS for name in names)


def _is_door(folder: Path) -> bool:
    tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
    return any(ast.unparse(node) == "need_no_cuda_to_import()" for node in tree.body)


def test_every_folder_that_imports_a_trainer_is_a_door() -> None:
    paths = [path for top in ("nemo_upcycle", "recipes") for path in (ROOT / top).rglob("*.py")]
    importing = [path for path in paths if _imports_a_trainer(path)]
    assert len(importing) > 50
    outside = [path for path in importing if not any(map(_is_door, _folders(path)))]
    assert outside == []


def _folders(path: Path) -> list[Path]:
    return [folder for folder in path.parents if (folder / "__init__.py").is_file()]
