"""Parents without a configuration in NeMo: its Llama's, or Mixtral's, with the parent's layers and settings."""

# No postponed annotations, and Optional: NeMo-Run parses settings of the model by them.

from pathlib import Path

import nemo_run as run
from nemo.collections.llm.gpt.model.base import GPTModel
from nemo.collections.llm.gpt.model.llama import LlamaConfig, LlamaModel
from nemo.collections.llm.gpt.model.mixtral import MixtralConfig, MixtralModel

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.activation import activation_function
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.layer_settings import window_fields
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.online.decoder_layers import layers_of


def decoder_model(dense: str, seq_length: int = 4096) -> run.Config[GPTModel]:
    """Return NeMo's model of a Granite, OLMo 3, SmolLM3, EXAONE 4, Qwen2-MoE or Glm4-MoE, for a recipe of yours.

    Args:
        dense: its Hugging Face folder.
        seq_length: length of the sequences to train on.

    Raises:
        SpecError: rotary frequencies are scaled, or differ from layer to layer.

    Example:
        >>> recipe.model = decoder_model("/models/granite-3.3-8b-base")  # doctest: +SKIP
    """
    arch = read_architecture(Path(dense))
    if arch.rope_scaling or arch.scales_in_layers:
        raise SpecError(
            "rope_scaling of the dense checkpoint",
            got=arch.rope_scaling or "a rotary embedding of its own in layers with windows",
            expected="none",
            fix="take NeMo's configuration of this family, or a GPTModel with online.decoder_layers",
        )
    layers = layers_of(arch)
    has_experts = bool(arch.num_experts)
    config = run.Config(
        MixtralConfig if has_experts else LlamaConfig,
        **megatron_fields(arch),
        **window_fields(arch),
        activation_func=activation_function(arch.activation),
        bias_activation_fusion=arch.activation == "silu",
        rotary_base=arch.rope_theta,
        rotary_percent=arch.rotary_percent,
        share_embeddings_and_output_weights=arch.tied_embeddings,
        transformer_layer_spec=run.Partial(layers.func, **layers.keywords),
        seq_length=seq_length,
        vocab_size=arch.vocab_size,
        **({"moe_grouped_gemm": True} if has_experts else {}),
    )
    return run.Config(MixtralModel if has_experts else LlamaModel, config=config)
