"""Mixtral in the form of a contribution to Megatron-Bridge, there `models/mixtral/mixtral_bridge.py`."""

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import AutoMapping, GatedMLPMapping, QKVMapping
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MixtralForCausalLM


_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.*.input_layernorm.weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
    "decoder.layers.*.mlp.router.weight": "model.layers.*.block_sparse_moe.gate.weight",
}
_ATTENTION, _EXPERT = "model.layers.*.self_attn.", "model.layers.*.block_sparse_moe.experts.*."


@MegatronModelBridge.register_bridge(source=MixtralForCausalLM, target=GPTModel, model_type="mixtral")
class MixtralBridge(MegatronModelBridge):
    """Megatron Bridge of Mixtral: experts in every layer, whose weights sum to one."""

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> GPTModelProvider:
        """Return the provider of a model of this class."""
        provider = super().provider_bridge(hf_pretrained)
        config = hf_pretrained.config
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        provider.hidden_dropout = 0.0
        provider.autocast_dtype = torch.bfloat16
        provider.window_size = (config.sliding_window - 1, 0) if config.sliding_window else None
        provider.moe_ffn_hidden_size = config.intermediate_size
        provider.moe_router_pre_softmax = False
        provider.moe_router_load_balancing_type = "aux_loss"
        provider.moe_grouped_gemm = True
        provider.moe_token_dispatcher_type = "alltoall"
        provider.moe_permute_fusion = True
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return which tensor is made of which."""
        mappings = [AutoMapping(megatron_param=megatron, hf_param=theirs) for megatron, theirs in _NAMES.items()]
        qkv = {name: f"{_ATTENTION}{name}_proj.weight" for name in "qkv"}
        mappings.append(QKVMapping(megatron_param="decoder.layers.*.self_attention.linear_qkv.weight", **qkv))
        for fc in ("mlp.experts.linear_fc{}.weight*", "mlp.experts.local_experts.*.linear_fc{}.weight"):
            fc1, fc2 = (f"decoder.layers.*.{fc.format(number)}" for number in (1, 2))
            mappings.append(GatedMLPMapping(fc1, gate=f"{_EXPERT}w1.weight", up=f"{_EXPERT}w3.weight"))
            mappings.append(AutoMapping(fc2, f"{_EXPERT}w2.weight"))
        return MegatronMappingRegistry(*mappings)
