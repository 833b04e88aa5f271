"""The rotary embedding's frequencies are equal to the frequencies in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle.models.rotary import attention_factor, rope_frequencies
from tests.models import LLAMA3_SCALING, small_architecture


#: Settings in published config.json files (Llama 3.1 8B, Qwen3 8B for 131,072 positions, gpt-oss 20B), and two more.
PUBLISHED: list[tuple[int, float, dict[str, Any]]] = [
    (128, 500000.0, LLAMA3_SCALING),
    (128, 1000000.0, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    (
        *(64, 150000.0),
        {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False},
    ),
    (64, 10000.0, {"rope_type": "linear", "factor": 3.0}),
    (64, 10000.0, {"rope_type": "default"}),
]


@pytest.mark.parametrize(("head_dim", "theta", "scaling"), PUBLISHED, ids=str)
def test_frequencies_and_factor_are_transformers(head_dim: int, theta: float, scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    arch = small_architecture(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling, max_positions=131072)
    sizes = {"head_dim": head_dim, "rope_theta": theta, "max_position_embeddings": 131072}
    embedding = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_scaling=scaling))
    torch.testing.assert_close(rope_frequencies(arch), embedding.inv_freq, rtol=1e-5, atol=0)
    assert attention_factor(arch) == pytest.approx(embedding.attention_scaling)


@pytest.mark.parametrize("length", [16, 512])
def test_longrope_has_transformers_frequencies_and_factor(length: int) -> None:
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = {"short_factor": [1.0 + n / 10 for n in range(6)], "long_factor": [2.0 + n for n in range(6)]}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 2048}
    said = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 128}
    config = Phi3Config(**sizes, **said, rope_scaling=factors | {"type": "longrope"})
    scaling = factors | {"rope_type": "longrope", "original_max_position_embeddings": 128}
    arch = small_architecture(rope_scaling=scaling, rotary_percent=0.75, max_positions=2048)
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
    torch.testing.assert_close(rope_frequencies(arch, length), expected, rtol=1e-6, atol=0)
    assert attention_factor(arch) == pytest.approx(factor)
