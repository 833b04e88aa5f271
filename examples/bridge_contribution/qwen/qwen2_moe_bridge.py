"""Qwen2-MoE in the form of a contribution to Megatron-Bridge, there `models/qwen/qwen2_moe_bridge.py`."""

from functools import partial

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Qwen2MoeForCausalLM


_NAMES = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "decoder.layers.*.input_layernorm.weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "model.layers.*.input_layernorm.weight",
    "decoder.layers.*.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
    "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "model.layers.*.post_attention_layernorm.weight",
    "decoder.layers.*.mlp.router.weight": "model.layers.*.mlp.gate.weight",
}
#: Networks in Megatron -> in the folder: of dense layers, the shared expert, experts in one module or one by one.
_NETWORKS = {
    "mlp.linear_fc{}.weight": "mlp.",
    "mlp.shared_experts.linear_fc{}.weight": "mlp.shared_expert.",
    "mlp.experts.linear_fc{}.weight*": "mlp.experts.*.",
    "mlp.experts.local_experts.*.linear_fc{}.weight": "mlp.experts.*.",
}


@MegatronModelBridge.register_bridge(source=Qwen2MoeForCausalLM, target=GPTModel, model_type="qwen2_moe")
class Qwen2MoEBridge(MegatronModelBridge):
    """Megatron Bridge of Qwen2-MoE: biases of query, key and value, a shared expert behind a gate, dense layers."""

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM) -> GPTModelProvider:
        """Return the provider of a model of this class."""
        provider = super().provider_bridge(hf_pretrained)
        config = hf_pretrained.config
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = False
        provider.add_qkv_bias = config.qkv_bias
        provider.hidden_dropout = 0.0
        provider.autocast_dtype = torch.bfloat16
        provider.transformer_layer_spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
        provider.moe_layer_freq = [
            int(layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0)
            for layer in range(config.num_hidden_layers)
        ]
        provider.moe_shared_expert_intermediate_size = config.shared_expert_intermediate_size
        provider.moe_shared_expert_gate = True
        provider.moe_router_pre_softmax = not config.norm_topk_prob
        provider.moe_router_load_balancing_type = "aux_loss"
        provider.moe_grouped_gemm = True
        provider.moe_token_dispatcher_type = "alltoall"
        provider.moe_permute_fusion = True
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return which tensor is made of which."""
        layer = "model.layers.*."
        mappings = [AutoMapping(megatron_param=megatron, hf_param=theirs) for megatron, theirs in _NAMES.items()]
        for kind in ("weight", "bias"):
            qkv = {name: f"{layer}self_attn.{name}_proj.{kind}" for name in "qkv"}
            mappings.append(QKVMapping(megatron_param=f"decoder.layers.*.self_attention.linear_qkv.{kind}", **qkv))
        for network, theirs in _NETWORKS.items():
            fc1, fc2 = (f"decoder.layers.*.{network.format(number)}" for number in (1, 2))
            gate, up, down = (f"{layer}{theirs}{name}_proj.weight" for name in ("gate", "up", "down"))
            mappings += [GatedMLPMapping(fc1, gate=gate, up=up), AutoMapping(fc2, down)]
        gate = ReplicatedMapping(
            megatron_param="decoder.layers.*.mlp.shared_experts.gate_weight",
            hf_param=f"{layer}mlp.shared_expert_gate.weight",
        )
        return MegatronMappingRegistry(*mappings, gate)
