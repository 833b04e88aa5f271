"""Shapes and counts from a config.json, and the refusal of what is no Llama."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.architecture import architecture_from_config, read_architecture
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.spec import UpcycleSpec


LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
}


def test_llama_3_8b_and_its_eight_experts() -> None:
    dense = architecture_from_config(LLAMA3_8B)
    moe = dense.upcycled(UpcycleSpec(num_experts=8, top_k=2))
    assert dense.total_params == dense.active_params == 8_030_261_248
    assert (moe.total_params, moe.active_params) == (47_491_321_856, 13_668_454_400)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": []}, ["architectures", "nothing"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads", "5", "32"]),
        ({"vocab_size": "many"}, ["vocab_size", "many"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
    ],
)
def test_what_does_not_fit_is_named(changes: dict, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_from_config(LLAMA3_8B | changes)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_architecture(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_architecture(tmp_path / "nowhere")
