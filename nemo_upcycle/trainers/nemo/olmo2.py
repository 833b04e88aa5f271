"""OLMo 2 for NeMo, which lacks this model: a configuration whose layers have their norms in OLMo 2's places."""

# Do not postpone annotations here, and use Optional: NeMo-Run needs annotations to parse settings of the model.

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import nemo_run as run
import torch
from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel

from nemo_upcycle.online.decoder_layers import decoder_layers


_LAYERS = partial(decoder_layers, use_transformer_engine=True, pre_norm=False, post_norm=True, wide_qk_norm=True)


@dataclass
class Olmo2Config(GPTConfig):
    """Configuration of an OLMo 2, dense or with experts; the defaults hold for all sizes.

    Example:
        >>> Olmo2Config7B(num_moe_experts=8, moe_router_topk=2)  # doctest: +SKIP
    """

    normalization: str = "RMSNorm"
    activation_func: Callable = torch.nn.functional.silu
    gated_linear_unit: bool = True
    position_embedding_type: str = "rope"
    add_bias_linear: bool = False
    seq_length: int = 4096
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    share_embeddings_and_output_weights: bool = False
    qk_layernorm: bool = True
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 500000.0
    vocab_size: int | None = 100352
    bias_activation_fusion: bool = True
    masked_softmax_fusion: bool = True
    persist_layer_norm: bool = True
    bias_dropout_fusion: bool = True
    apply_rope_fusion: bool = True
    transformer_layer_spec: Any = _LAYERS


@dataclass
class Olmo2Config7B(Olmo2Config):
    """OLMo 2 7B (OLMo-2-1124-7B): 7.30B parameters."""

    num_layers: int = 32
    hidden_size: int = 4096
    ffn_hidden_size: int = 11008
    num_attention_heads: int = 32
    num_query_groups: int | None = 32


class Olmo2Model(GPTModel):
    """NeMo's model of an `Olmo2Config`."""


def model() -> run.Config:
    """Make the configuration of OLMo 2 7B, as `model()` in NeMo's recipe modules does for other models."""
    return run.Config(Olmo2Model, config=run.Config(Olmo2Config7B))
