"""The rotary embedding's frequencies are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle.models.rotary import rope_frequencies
from tests.models import small_architecture


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "llama3", **LLAMA3}], ids=["unscaled", "llama3"])
def test_frequencies_are_those_of_transformers(scaling: dict[str, Any] | None) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    arch = small_architecture(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
    config = LlamaConfig(head_dim=64, rope_theta=500000.0, rope_scaling=scaling, max_position_embeddings=512)
    torch.testing.assert_close(rope_frequencies(arch), LlamaRotaryEmbedding(config).inv_freq, rtol=1e-5, atol=0)
