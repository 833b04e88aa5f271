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

from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from transformers import MixtralForCausalLM

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
)
from megatron.bridge.models.conversion.utils import mcore_to_hf_window_size
from megatron.bridge.models.gpt_provider import GPTModelProvider


@MegatronModelBridge.register_bridge(source=MixtralForCausalLM, target=GPTModel, model_type="mixtral")
class MixtralBridge(  # type: ignore[type-var]  # register_bridge is annotated for instances, not classes
    MegatronModelBridge[Any, GPTModelProvider, GPTModel]
):
    """
    Megatron Bridge for Mixtral Causal LM.

    Every layer of Mixtral has experts, and the weights of a token's experts sum to one: Megatron's softmax over the
    scores of the top-k experts.

    Example:
        >>> from megatron.bridge import AutoBridge
        >>> bridge = AutoBridge.from_hf_pretrained("mistralai/Mixtral-8x7B-v0.1")
        >>> provider = bridge.to_megatron_provider()
    """

    def hf_config_to_model_config_kwargs(self, hf_config: Any) -> dict[str, Any]:
        """Convert a Hugging Face Mixtral config to builder config kwargs."""
        config_kwargs = super().hf_config_to_model_config_kwargs(hf_config)
        config_kwargs.setdefault("position_embedding_type", "rope")
        return config_kwargs | self._mixtral_kwargs(hf_config)

    def hf_config_to_provider_kwargs(self, hf_config: Any) -> dict[str, Any]:
        """Convert a Hugging Face Mixtral config to provider kwargs."""
        return super().hf_config_to_provider_kwargs(hf_config) | self._mixtral_kwargs(hf_config)

    @staticmethod
    def _mixtral_kwargs(hf_config: Any) -> dict[str, Any]:
        """Set the fields that CONFIG_MAPPING does not cover, for providers and builders."""
        sliding_window = getattr(hf_config, "sliding_window", None)
        return {
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "add_bias_linear": False,
            "add_qkv_bias": False,
            "hidden_dropout": 0.0,
            "autocast_dtype": torch.bfloat16,
            "window_size": (sliding_window - 1, 0) if sliding_window else None,
            "cp_comm_type": "a2a" if sliding_window else None,
            "moe_ffn_hidden_size": hf_config.intermediate_size,  # Mixtral has no dense MLP
            "moe_router_pre_softmax": False,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_input_jitter_eps": getattr(hf_config, "router_jitter_noise", None) or None,
            "moe_grouped_gemm": True,
            "moe_token_dispatcher_type": "alltoall",
            "moe_permute_fusion": True,
        }

    @classmethod
    def megatron_to_hf_config(cls, provider: GPTModelProvider) -> dict[str, Any]:
        """Convert a Megatron provider config to a Hugging Face MixtralConfig dict.

        Args:
            provider: Provider of a model whose layers all have experts.

        Returns:
            Dictionary of Hugging Face MixtralConfig parameters.
        """
        hf_config = super().megatron_to_hf_config(provider)
        hf_config["intermediate_size"] = provider.moe_ffn_hidden_size or provider.ffn_hidden_size
        hf_config["sliding_window"] = mcore_to_hf_window_size(provider.window_size)
        hf_config["router_jitter_noise"] = provider.moe_input_jitter_eps or 0.0
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
            "decoder.layers.*.mlp.router.weight": "model.layers.*.block_sparse_moe.gate.weight",
        }
        mapping_list: list[MegatronParamMapping[Any]] = [
            AutoMapping(megatron_param=megatron_param, hf_param=hf_param)
            for megatron_param, hf_param in param_mappings.items()
        ]
        mapping_list.append(
            QKVMapping(
                megatron_param="decoder.layers.*.self_attention.linear_qkv.weight",
                q="model.layers.*.self_attn.q_proj.weight",
                k="model.layers.*.self_attn.k_proj.weight",
                v="model.layers.*.self_attn.v_proj.weight",
            )
        )
        # Grouped experts have one parameter per expert, sequential experts one module per expert
        for fc1, fc2 in (
            ("experts.linear_fc1.weight*", "experts.linear_fc2.weight*"),
            ("experts.local_experts.*.linear_fc1.weight", "experts.local_experts.*.linear_fc2.weight"),
        ):
            mapping_list += [
                GatedMLPMapping(
                    megatron_param=f"decoder.layers.*.mlp.{fc1}",
                    gate="model.layers.*.block_sparse_moe.experts.*.w1.weight",
                    up="model.layers.*.block_sparse_moe.experts.*.w3.weight",
                ),
                AutoMapping(
                    megatron_param=f"decoder.layers.*.mlp.{fc2}",
                    hf_param="model.layers.*.block_sparse_moe.experts.*.w2.weight",
                ),
            ]
        return MegatronMappingRegistry(*mapping_list)
