# Copyright (c) 2026, NVIDIA CORPORATION.  All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

import math
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import Qwen2MoeForCausalLM

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


@MegatronModelBridge.register_bridge(source=Qwen2MoeForCausalLM, target=GPTModel, model_type="qwen2_moe")
class Qwen2MoEBridge(  # type: ignore[type-var]  # register_bridge is annotated for instances, not classes
    MegatronModelBridge[Any, GPTModelProvider, GPTModel]
):
    """
    Megatron Bridge for Qwen2 MoE Causal LM.

    Qwen1.5-MoE and Qwen2-MoE have biases of query, key and value, a shared expert behind a gate, and may have dense
    layers among those with experts.

    Example:
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("Qwen/Qwen1.5-MoE-A2.7B")
        >>> provider = bridge.to_megatron_provider()
    """

    def provider_bridge(self, hf_pretrained: PreTrainedCausalLM[Any]) -> GPTModelProvider:
        """Convert a Hugging Face Qwen2 MoE config to GPTModelProvider."""
        provider: GPTModelProvider = super().provider_bridge(hf_pretrained)
        # The provider's default layer spec has experts in every layer
        provider.transformer_layer_spec = partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
        return provider

    def hf_config_to_model_config_kwargs(self, hf_config: Any) -> dict[str, Any]:
        """Convert a Hugging Face Qwen2 MoE config to builder config kwargs."""
        config_kwargs = super().hf_config_to_model_config_kwargs(hf_config)
        config_kwargs.setdefault("position_embedding_type", "rope")
        return config_kwargs | self._qwen2_moe_kwargs(hf_config)

    def hf_config_to_provider_kwargs(self, hf_config: Any) -> dict[str, Any]:
        """Convert a Hugging Face Qwen2 MoE config to provider kwargs."""
        return super().hf_config_to_provider_kwargs(hf_config) | self._qwen2_moe_kwargs(hf_config)

    @staticmethod
    def _qwen2_moe_kwargs(hf_config: Any) -> dict[str, Any]:
        """Set the fields that CONFIG_MAPPING does not cover, for providers and builders."""
        if getattr(hf_config, "use_sliding_window", False):
            raise ValueError("Qwen2MoEBridge supports full attention only, got use_sliding_window=True")
        dense_layers = getattr(hf_config, "mlp_only_layers", None) or []
        sparse_step = getattr(hf_config, "decoder_sparse_step", 1)
        return {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": getattr(hf_config, "qkv_bias", True),
            "hidden_dropout": 0.0,
            "autocast_dtype": torch.bfloat16,
            "moe_layer_freq": [
                int(layer not in dense_layers and (layer + 1) % sparse_step == 0)
                for layer in range(hf_config.num_hidden_layers)
            ],
            "moe_shared_expert_intermediate_size": hf_config.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
            "moe_router_pre_softmax": not hf_config.norm_topk_prob,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "alltoall",
            "moe_permute_fusion": True,
        }

    @classmethod
    def megatron_to_hf_config(cls, provider: GPTModelProvider) -> dict[str, Any]:
        """Convert a Megatron provider config to a Hugging Face Qwen2MoeConfig dict.

        Args:
            provider: Provider of a model with a shared expert.

        Returns:
            Dictionary of Hugging Face Qwen2MoeConfig parameters. Dense layers are said by the largest
            `decoder_sparse_step` that has every layer with experts, and `mlp_only_layers` for the others.
        """
        hf_config = super().megatron_to_hf_config(provider)
        has_experts = provider.moe_layer_freq
        if isinstance(has_experts, int):
            has_experts = [int(layer % has_experts == 0) for layer in range(provider.num_layers)]
        sparse_step = math.gcd(*(layer + 1 for layer, experts in enumerate(has_experts) if experts)) or 1
        hf_config["decoder_sparse_step"] = sparse_step
        hf_config["mlp_only_layers"] = [
            layer for layer, experts in enumerate(has_experts) if not experts and (layer + 1) % sparse_step == 0
        ]
        hf_config["norm_topk_prob"] = not provider.moe_router_pre_softmax
        hf_config["qkv_bias"] = provider.add_qkv_bias
        hf_config["shared_expert_intermediate_size"] = provider.moe_shared_expert_intermediate_size
        return hf_config

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Map Megatron parameters to Hugging Face parameters."""
        # Megatron parameter -> Hugging Face parameter of the same shape
        param_mappings = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": "lm_head.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
            "decoder.layers.*.input_layernorm.weight": "model.layers.*.input_layernorm.weight",
            "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": "model.layers.*.input_layernorm.weight",
            "decoder.layers.*.self_attention.linear_proj.weight": "model.layers.*.self_attn.o_proj.weight",
            "decoder.layers.*.pre_mlp_layernorm.weight": "model.layers.*.post_attention_layernorm.weight",
            # Dense layers
            "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": "model.layers.*.post_attention_layernorm.weight",
            # Layers with experts
            "decoder.layers.*.mlp.router.weight": "model.layers.*.mlp.gate.weight",
        }
        mapping_list: list[MegatronParamMapping[Any]] = [
            AutoMapping(megatron_param=megatron_param, hf_param=hf_param)
            for megatron_param, hf_param in param_mappings.items()
        ]
        for kind in ("weight", "bias"):
            mapping_list.append(
                QKVMapping(
                    megatron_param=f"decoder.layers.*.self_attention.linear_qkv.{kind}",
                    q=f"model.layers.*.self_attn.q_proj.{kind}",
                    k=f"model.layers.*.self_attn.k_proj.{kind}",
                    v=f"model.layers.*.self_attn.v_proj.{kind}",
                )
            )
        for fc1, fc2, network in (
            ("linear_fc1.weight", "linear_fc2.weight", "mlp"),
            ("shared_experts.linear_fc1.weight", "shared_experts.linear_fc2.weight", "mlp.shared_expert"),
            # Grouped experts have one parameter per expert, sequential experts one module per expert
            ("experts.linear_fc1.weight*", "experts.linear_fc2.weight*", "mlp.experts.*"),
            (
                "experts.local_experts.*.linear_fc1.weight",
                "experts.local_experts.*.linear_fc2.weight",
                "mlp.experts.*",
            ),
        ):
            mapping_list += [
                GatedMLPMapping(
                    megatron_param=f"decoder.layers.*.mlp.{fc1}",
                    gate=f"model.layers.*.{network}.gate_proj.weight",
                    up=f"model.layers.*.{network}.up_proj.weight",
                ),
                AutoMapping(
                    megatron_param=f"decoder.layers.*.mlp.{fc2}",
                    hf_param=f"model.layers.*.{network}.down_proj.weight",
                ),
            ]
        mapping_list.append(
            ReplicatedMapping(
                megatron_param="decoder.layers.*.mlp.shared_experts.gate_weight",
                hf_param="model.layers.*.mlp.shared_expert_gate.weight",
            )
        )
        return MegatronMappingRegistry(*mapping_list)
