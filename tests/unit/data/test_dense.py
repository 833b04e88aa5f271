"""What the user names as dense model is checked before anything is fetched, and then found or fetched whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_upcycle.data.dense import _UNWANTED, WANTED, check_address, import_dense
from nemo_upcycle.errors import UpcycleError
from tests.models import write_llama, write_tokenizer


def test_a_local_folder_is_used_where_it_lies(tiny_dense, tmp_path):
    for source in (str(tiny_dense), f"hf://{tiny_dense}"):
        assert import_dense(source, tmp_path / "out") == tiny_dense
        check_address(source)
    assert not (tmp_path / "out").exists()


def test_the_hub_is_asked_for_one_set_of_weights_and_every_companion():
    utils = pytest.importorskip("huggingface_hub.utils")
    wanted = ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "README.md"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    others = ["original/model.safetensors", "original/params.json", "original/tokenizer.model", "tokenizer/vocab.json"]
    others += ["onnx/model.onnx", "consolidated.safetensors", "pytorch_model.bin", "modeling_x.py", "code/README.md"]
    patterns = {"allow_patterns": WANTED, "ignore_patterns": _UNWANTED}
    assert list(utils.filter_repo_objects(wanted + others, **patterns)) == wanted


def test_refuses_a_folder_that_lacks_a_part(tiny_dense, tmp_path):
    messages = {"config.json": r"config\.json", "model.safetensors": r"model\.safetensors"}
    messages |= {"tokenizer.json": r"tokenizer in .*got none, expected one of tokenizer\.json"}
    for missing, message in messages.items():
        folder = shutil.copytree(tiny_dense, tmp_path / missing)
        (folder / missing).unlink()
        with pytest.raises(UpcycleError, match=message):
            import_dense(str(folder), tmp_path / "out")


def test_a_configuration_alone_says_what_the_parent_is_where_nothing_is_read(tmp_path: Path) -> None:
    whole = write_tokenizer(write_llama(tmp_path / "whole"))
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "config.json").write_bytes((whole / "config.json").read_bytes())
    assert check_address(str(alone)) == check_address(str(whole), whole=True)
    with pytest.raises(UpcycleError, match=r"got none, expected one of tokenizer\.json"):
        check_address(str(alone), whole=True)
    (alone / "model.safetensors.index.json").write_text("{}")  # weights, which are not whole
    with pytest.raises(UpcycleError):
        check_address(str(alone))
    weights = whole / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UpcycleError, match=r"model\.safetensors"):
        check_address(str(whole))


def test_refuses_an_asset_that_is_no_dense_model() -> None:
    with pytest.raises(UpcycleError, match="model asset 'mmlu' does not exist"):
        check_address("asset://mmlu")
