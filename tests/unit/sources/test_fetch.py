"""A local model is used in place, and a remote model is fetched whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.fetch import _UNWANTED, WANTED, import_dense
from nemo_upcycle.sources.find import Parent
from tests.models import write_llama, write_tokenizer


@pytest.fixture
def tiny_dense(tmp_path: Path) -> Path:
    return write_tokenizer(write_llama(tmp_path / "tiny"))


def test_a_local_folder_is_used_where_it_lies(tiny_dense: Path, tmp_path: Path) -> None:
    for source in (str(tiny_dense), f"hf://{tiny_dense}"):
        assert import_dense(source, tmp_path / "out") == tiny_dense
        assert Parent(source).configured
    assert not (tmp_path / "out").exists()


def test_one_set_of_weights_and_every_companion_is_fetched() -> None:
    utils = pytest.importorskip("huggingface_hub.utils")
    wanted = ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "README.md"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    others = ["original/model.safetensors", "original/params.json", "original/tokenizer.model", "tokenizer/vocab.json"]
    others += ["onnx/model.onnx", "consolidated.safetensors", "pytorch_model.bin", "modeling_x.py", "code/README.md"]
    patterns = {"allow_patterns": WANTED, "ignore_patterns": _UNWANTED}
    assert list(utils.filter_repo_objects(wanted + others, **patterns)) == wanted


def test_refuses_a_folder_that_lacks_a_part(tiny_dense: Path, tmp_path: Path) -> None:
    messages = {"config.json": r"config\.json", "model.safetensors": r"model\.safetensors"}
    messages |= {"tokenizer.json": r"Folder .* has no tokenizer \(tokenizer\.json"}
    for missing, message in messages.items():
        folder = shutil.copytree(tiny_dense, tmp_path / missing)
        (folder / missing).unlink()
        with pytest.raises(UpcycleError, match=message):
            import_dense(str(folder), tmp_path / "out")
