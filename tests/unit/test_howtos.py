"""The how-tos in docs/: a copy of the package gets their files and changes, then their commands are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.models import write_llama, write_tokenizer


pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the installed package that a how-to may change; `recipes` links to its recipes."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nemo_upcycle", tmp_path / "nemo_upcycle", ignore=ignored)
    for name in ("recipes", "conf"):
        shutil.copytree(ROOT / name, tmp_path / "nemo_upcycle" / name, ignore=ignored)
    shutil.copytree(ROOT / "tests", tmp_path / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "recipes").symlink_to("nemo_upcycle/recipes")
    return tmp_path


def test_what_the_page_of_mergekit_types_makes_its_models_experts(tmp_path: Path) -> None:
    names = ("base", "law")
    for factor, name in enumerate(names, 1):
        folder = write_tokenizer(write_llama(tmp_path / "models" / name, vocab_size=259, layers=2))
        weights = load_file(folder / "model.safetensors")
        weights = {key: factor * value for key, value in weights.items()}
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    page = (ROOT / "docs/mergekit.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```bash\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["bash", "-e", "-c", block], cwd=tmp_path, env=os.environ | {"PATH": path}, check=True)
    made = load_file(tmp_path / "runs/moe/model.safetensors")
    for expert in range(4):
        dense = load_file(tmp_path / "models" / names[expert % 2] / "model.safetensors")
        for theirs, ours in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
            weights = dense[f"model.layers.1.mlp.{theirs}_proj.weight"].bfloat16()
            assert weights.equal(made[f"model.layers.1.block_sparse_moe.experts.{expert}.{ours}.weight"])


@pytest.mark.parametrize("page", sorted(path.stem for path in (ROOT / "docs").glob("add_*.md")))
def test_howto_works_as_written(page: str, tree: Path) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(python|diff|bash)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert {"python", "bash"} <= {language for language, _ in blocks}
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(tree)}
    variables |= {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    for language, block in blocks:
        if language == "python":
            path, _, code = block.partition("\n")
            (tree / path.removeprefix("# ")).write_text(code, encoding="utf-8")
        else:
            command, given = ["bash", "-e", "-c", block], None
            if language == "diff":
                command, given = ["git", "apply", "-"], block
            own = os.environ | variables
            done = subprocess.run(command, cwd=tree, input=given, env=own, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"
            assert "no tests ran" not in done.stdout
