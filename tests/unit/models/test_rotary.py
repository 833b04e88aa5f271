"""The rotary embedding's frequencies are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle.models.rotary import attention_factor, rope_frequencies
from tests.models import small_architecture


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "llama3", **LLAMA3}], ids=["unscaled", "llama3"])
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    arch = small_architecture(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    config = LlamaConfig(head_dim=64, rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=512)
    torch.testing.assert_close(rope_frequencies(arch), LlamaRotaryEmbedding(config).inv_freq, rtol=1e-5, atol=0)


@pytest.mark.parametrize("length", [16, 512])
def test_longrope_has_transformers_frequencies_and_factor(length: int) -> None:
    from transformers import Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    factors = {"short_factor": [1.0 + n / 10 for n in range(6)], "long_factor": [2.0 + n for n in range(6)]}
    config = Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        partial_rotary_factor=0.75,
        max_position_embeddings=2048,
        original_max_position_embeddings=128,
        rope_scaling=factors | {"type": "longrope"},
    )
    scaling = factors | {"rope_type": "longrope", "original_max_position_embeddings": 128}
    arch = small_architecture(rope_scaling=scaling, rotary_percent=0.75, max_positions=2048)
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"), seq_len=length)
    torch.testing.assert_close(rope_frequencies(arch, length), expected, rtol=1e-6, atol=0)
    assert attention_factor(arch) == pytest.approx(factor)


@pytest.mark.parametrize("truncate", [True, False])
def test_yarn_has_transformers_frequencies_and_factor(truncate: bool) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096, "truncate": truncate}
    arch = small_architecture(head_dim=64, rope_theta=10000.0, rope_scaling=scaling)
    config = LlamaConfig(head_dim=64, rope_theta=10000.0, rope_scaling=scaling, max_position_embeddings=32768)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    torch.testing.assert_close(rope_frequencies(arch), expected, rtol=1e-6, atol=0)
    assert attention_factor(arch) == pytest.approx(factor)
