"""Copies the package as it is installed, without the modules that only NeMo needs."""

from __future__ import annotations

import shutil
from pathlib import Path


ROOT = Path(__file__).parents[1]


def copy_without_nemo(folder: Path) -> Path:
    """Copy the package without NeMo's folders and data modules, and return the folder to put on Python's path.

    NeMo's data modules are in `data/`, because runs and checkpoints of earlier releases refer to these paths.
    """
    tree = folder / "tree"
    shutil.copytree(ROOT / "nemo_upcycle", tree / "nemo_upcycle", ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("recipes", "conf"):
        shutil.copytree(ROOT / part, tree / "nemo_upcycle" / part, ignore=shutil.ignore_patterns("__pycache__"))
    for room in ("trainers", "pipeline"):
        shutil.rmtree(tree / "nemo_upcycle" / room / "nemo")
    for module in ("blend_module", "chat_module"):
        (tree / "nemo_upcycle/data" / f"{module}.py").unlink()
    return tree
