"""A bridge of Mixtral, which Megatron-Bridge lacks.

Import this module, then `AutoBridge` imports and exports `MixtralForCausalLM`.
"""

from __future__ import annotations

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MixtralForCausalLM

from nemo_upcycle.bridge.models import provider_of
from nemo_upcycle.models.architecture import architecture_from_config


_LAYER = "decoder.layers.*."
_HF = "model.layers.*."
_EXPERTS = _HF + "block_sparse_moe.experts.*."


@MegatronModelBridge.register_bridge(source=MixtralForCausalLM, target=GPTModel, model_type="mixtral")
class MixtralBridge(MegatronModelBridge):  # type: ignore[misc]
    """Bridge of Mixtral, as `AutoBridge` finds it.

    Example:
        >>> AutoBridge.from_hf_pretrained("runs/demo/hf").to_megatron_provider()  # doctest: +SKIP
    """

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """Return the provider of a Mixtral."""
        return provider_of(architecture_from_config(hf_pretrained.config.to_dict()))

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return which tensor is made of which, with Transformer Engine's modules and with the local ones."""
        names = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "lm_head.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            _LAYER + "self_attention.linear_qkv.layer_norm_weight": _HF + "input_layernorm.weight",
            _LAYER + "input_layernorm.weight": _HF + "input_layernorm.weight",
            _LAYER + "pre_mlp_layernorm.weight": _HF + "post_attention_layernorm.weight",
            _LAYER + "self_attention.linear_proj.weight": _HF + "self_attn.o_proj.weight",
            _LAYER + "mlp.router.weight": _HF + "block_sparse_moe.gate.weight",
        }
        mappings: list[Any] = [AutoMapping(megatron_param=ours, hf_param=theirs) for ours, theirs in names.items()]
        attention = {name: f"{_HF}self_attn.{name}_proj.weight" for name in ("q", "k", "v")}
        mappings.append(QKVMapping(megatron_param=_LAYER + "self_attention.linear_qkv.weight", **attention))
        for fc1, fc2 in (
            ("experts.linear_fc1.weight*", "experts.linear_fc2.weight*"),
            ("experts.local_experts.*.linear_fc1.weight", "experts.local_experts.*.linear_fc2.weight"),
        ):
            parts = {"gate": _EXPERTS + "w1.weight", "up": _EXPERTS + "w3.weight"}
            mappings.append(GatedMLPMapping(megatron_param=f"{_LAYER}mlp.{fc1}", **parts))
            mappings.append(AutoMapping(megatron_param=f"{_LAYER}mlp.{fc2}", hf_param=_EXPERTS + "w2.weight"))
        return MegatronMappingRegistry(*mappings)
