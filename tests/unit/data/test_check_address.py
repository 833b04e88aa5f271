"""What the user names as dense model is checked before anything is fetched."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.data.dense import check_address
from nemo_upcycle.errors import UpcycleError
from tests.models import write_llama, write_tokenizer


@pytest.fixture(autouse=True)
def nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that cannot be written, and no network."""
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", "/dev/null/cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(
    "source", ["asset://smollm2-135m", "hf://meta-llama/Meta-Llama-3-8B", "meta-llama/Llama-3.2-1B"]
)
def test_names_of_assets_and_of_the_hub_are_taken_as_they_are(source: str) -> None:
    check_address(source)


def test_a_folder_is_opened(tmp_path: Path) -> None:
    folder = write_tokenizer(write_llama(tmp_path / "model"))
    check_address(str(folder))
    check_address(f"hf://{folder}")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UpcycleError, match=r"model\.safetensors"):
        check_address(str(folder))


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


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/nope", "got no such folder"),
        ("asset://smollm", r"Did you mean 'smollm2-135m'\?"),
        ("asset://mmlu", "model asset 'mmlu' does not exist"),
        ("s3://bucket/model", "address scheme 's3' does not exist. Valid: asset, hf"),
        ("nemo:///checkpoints/x", "got a NeMo or Megatron checkpoint, expected a Hugging Face folder"),
    ],
)
def test_refuses_what_cannot_be_a_dense_model(source: str, words: str) -> None:
    with pytest.raises(UpcycleError, match=words):
        check_address(source)
