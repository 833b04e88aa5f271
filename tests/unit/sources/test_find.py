"""Check the address of a model, without fetching it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.find import check_address
from tests.models import write_llama, write_tokenizer


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
