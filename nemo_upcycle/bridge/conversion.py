"""Bridges of the classes that Megatron-Bridge lacks: Mixtral and Qwen2-MoE.

Import this module, then `AutoBridge` imports and exports `MixtralForCausalLM` and `Qwen2MoeForCausalLM`.
"""

from __future__ import annotations

from typing import Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MixtralForCausalLM, Qwen2MoeForCausalLM

from nemo_upcycle.bridge.models import provider_of
from nemo_upcycle.models.architecture import architecture_from_config


_LAYER = "decoder.layers.*."
_HF = "model.layers.*."


@MegatronModelBridge.register_bridge(source=MixtralForCausalLM, target=GPTModel, model_type="mixtral")
class MixtralBridge(MegatronModelBridge):
    """Bridge of Mixtral, as `AutoBridge` finds it.

    Example:
        >>> AutoBridge.from_hf_pretrained("runs/demo/hf").to_megatron_provider()  # doctest: +SKIP
    """

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """Return the provider of a Mixtral."""
        return provider_of(architecture_from_config(hf_pretrained.config.to_dict()))

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return which tensor is made of which, with Transformer Engine's modules and with the local ones."""
        moe = _HF + "block_sparse_moe."
        return MegatronMappingRegistry(
            *_common(), *_routed(moe + "gate.weight", moe + "experts.*.{}.weight", ("w1", "w3", "w2"))
        )


@MegatronModelBridge.register_bridge(source=Qwen2MoeForCausalLM, target=GPTModel, model_type="qwen2_moe")
class Qwen2MoeBridge(MegatronModelBridge):
    """Bridge of Qwen2-MoE: biases of query, key and value, a shared expert with a gate, dense layers.

    What the class always has, the Megatron model has, too: the folder's zeros where the upcycled model has none.
    """

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """Return the provider of a Qwen2-MoE."""
        config = hf_pretrained.config.to_dict()
        return provider_of(
            architecture_from_config(config),
            add_qkv_bias=True,
            moe_shared_expert_gate=True,
            moe_shared_expert_intermediate_size=config["shared_expert_intermediate_size"],
        )

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return which tensor is made of which, with Transformer Engine's modules and with the local ones."""
        mlp, theirs, parts = _LAYER + "mlp.", _HF + "mlp.", ("gate_proj", "up_proj", "down_proj")
        bias = {name: f"{_HF}self_attn.{name}_proj.bias" for name in ("q", "k", "v")}
        return MegatronMappingRegistry(
            *_common(),
            QKVMapping(megatron_param=_LAYER + "self_attention.linear_qkv.bias", **bias),
            AutoMapping(
                megatron_param=mlp + "linear_fc1.layer_norm_weight", hf_param=_HF + "post_attention_layernorm.weight"
            ),
            *_matrices(mlp + "linear_fc1.weight", mlp + "linear_fc2.weight", theirs + "{}.weight", parts),
            *_routed(theirs + "gate.weight", theirs + "experts.*.{}.weight", parts),
            *_matrices(
                mlp + "shared_experts.linear_fc1.weight",
                mlp + "shared_experts.linear_fc2.weight",
                theirs + "shared_expert.{}.weight",
                parts,
            ),
            ReplicatedMapping(
                megatron_param=mlp + "shared_experts.gate_weight", hf_param=theirs + "shared_expert_gate.weight"
            ),
        )


def _common() -> list[Any]:
    """Return the mappings of embedding, attention, norms and output layer."""
    names = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "lm_head.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        _LAYER + "self_attention.linear_qkv.layer_norm_weight": _HF + "input_layernorm.weight",
        _LAYER + "input_layernorm.weight": _HF + "input_layernorm.weight",
        _LAYER + "pre_mlp_layernorm.weight": _HF + "post_attention_layernorm.weight",
        _LAYER + "self_attention.linear_proj.weight": _HF + "self_attn.o_proj.weight",
    }
    attention = {name: f"{_HF}self_attn.{name}_proj.weight" for name in ("q", "k", "v")}
    return [
        *(AutoMapping(megatron_param=ours, hf_param=theirs) for ours, theirs in names.items()),
        QKVMapping(megatron_param=_LAYER + "self_attention.linear_qkv.weight", **attention),
    ]


def _routed(router: str, experts: str, parts: tuple[str, str, str]) -> list[Any]:
    """Return the mappings of routers and experts, grouped or sequential.

    Args:
        router: name in the folder.
        experts: name of an expert's matrix there, with a place for the part.
        parts: gate, up and down projection.
    """
    ours = _LAYER + "mlp.experts."
    return [
        AutoMapping(megatron_param=_LAYER + "mlp.router.weight", hf_param=router),
        *_matrices(ours + "linear_fc1.weight*", ours + "linear_fc2.weight*", experts, parts),
        *_matrices(
            ours + "local_experts.*.linear_fc1.weight", ours + "local_experts.*.linear_fc2.weight", experts, parts
        ),
    ]


def _matrices(fc1: str, fc2: str, theirs: str, parts: tuple[str, str, str]) -> list[Any]:
    """Return the mappings of an MLP."""
    gate, up, down = (theirs.format(part) for part in parts)
    return [
        GatedMLPMapping(megatron_param=fc1, gate=gate, up=up),
        AutoMapping(megatron_param=fc2, hf_param=down),
    ]
