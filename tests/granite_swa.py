"""GraniteSWA for transformers 4, which lacks the class: a Granite with the sinks of GPT-OSS in its attention.

All layers see the whole text and have positions.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward


class GraniteSWAConfig(GraniteConfig):
    """The configuration of `GraniteSWAForCausalLM`."""

    model_type = "granite_swa"


class GraniteSWAForCausalLM(GraniteForCausalLM):
    """A Granite with one sink per head."""

    config_class = GraniteSWAConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.sinks = torch.nn.Parameter(torch.zeros(config.num_attention_heads))
        self.config._attn_implementation = "sinks"


ALL_ATTENTION_FUNCTIONS.register("sinks", eager_attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register("sinks", eager_mask)
AutoConfig.register("granite_swa", GraniteSWAConfig)
AutoModelForCausalLM.register(GraniteSWAConfig, GraniteSWAForCausalLM)
