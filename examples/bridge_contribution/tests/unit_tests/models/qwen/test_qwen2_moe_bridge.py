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

"""Unit tests for the Qwen2 MoE bridge."""

from unittest.mock import Mock

import pytest
import torch
from transformers import PretrainedConfig, Qwen2MoeConfig

from megatron.bridge.models import AutoBridge
from megatron.bridge.models.gpt.model_config import BridgeGPTModelConfig
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM
from megatron.bridge.models.qwen import Qwen2MoEBridge


QWEN1_5_MOE_A2_7B = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "mlp_only_layers": [],
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "qkv_bias": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151936,
}


class TestQwen2MoEBridge:
    """Test cases for Qwen2MoEBridge class."""

    @pytest.fixture
    def mock_config(self):
        """Create a mock Qwen1.5-MoE-A2.7B configuration that has these attributes and no others."""
        config = Mock(spec=[])
        for key, value in QWEN1_5_MOE_A2_7B.items():
            setattr(config, key, value)
        return config

    @pytest.fixture
    def mock_pretrained(self, mock_config):
        """Create a mock PreTrainedCausalLM with the mock configuration."""
        pretrained = Mock(spec=PreTrainedCausalLM)
        pretrained.config = mock_config
        return pretrained

    def test_auto_bridge_selects_qwen2_moe(self):
        bridge = AutoBridge.from_hf_config(PretrainedConfig(architectures=["Qwen2MoeForCausalLM"]))
        assert isinstance(bridge._model_bridge, Qwen2MoEBridge)

    @pytest.mark.parametrize("build", ["provider", "model_config"])
    def test_config_mapping(self, mock_pretrained, build):
        bridge = Qwen2MoEBridge()
        if build == "provider":
            result = bridge.provider_bridge(mock_pretrained)
            assert isinstance(result, GPTModelProvider)
        else:
            result = bridge.hf_config_to_model_config(mock_pretrained.config)
            assert isinstance(result, BridgeGPTModelConfig)

        assert result.num_layers == 24
        assert result.hidden_size == 2048
        assert result.ffn_hidden_size == 5632
        assert result.num_attention_heads == 16
        assert result.num_query_groups == 16
        assert result.vocab_size == 151936
        assert result.seq_length == 8192
        assert result.rotary_base == 1000000.0
        assert result.position_embedding_type == "rope"
        assert result.layernorm_epsilon == 1e-06
        assert result.share_embeddings_and_output_weights is False
        assert result.params_dtype == torch.bfloat16
        assert result.bf16 is True
        assert result.normalization == "RMSNorm"
        assert result.gated_linear_unit is True
        assert result.add_bias_linear is False
        assert result.add_qkv_bias is True
        assert result.hidden_dropout == 0.0
        assert result.num_moe_experts == 60
        assert result.moe_router_topk == 4
        assert result.moe_ffn_hidden_size == 1408
        assert result.moe_layer_freq == [1] * 24
        assert result.moe_shared_expert_intermediate_size == 5632
        assert result.moe_shared_expert_gate is True
        assert result.moe_aux_loss_coeff == 0.001
        assert result.moe_router_pre_softmax is True
        assert result.moe_grouped_gemm is True

    @pytest.mark.parametrize(
        ("hf_fields", "moe_layer_freq"),
        [
            ({}, [1, 1, 1, 1]),
            ({"norm_topk_prob": True, "qkv_bias": False, "router_aux_loss_coef": 0.01}, [1, 1, 1, 1]),
            ({"decoder_sparse_step": 2}, [0, 1, 0, 1]),
            ({"mlp_only_layers": [0, 3]}, [0, 1, 1, 0]),
            ({"decoder_sparse_step": 2, "mlp_only_layers": [3], "num_hidden_layers": 6}, [0, 1, 0, 0, 0, 1]),
            ({"tie_word_embeddings": True, "shared_expert_intermediate_size": 256}, [1, 1, 1, 1]),
        ],
    )
    def test_config_roundtrip(self, mock_pretrained, hf_fields, moe_layer_freq):
        hf_fields = {"num_hidden_layers": 4} | hf_fields
        for key, value in hf_fields.items():
            setattr(mock_pretrained.config, key, value)

        provider = Qwen2MoEBridge().provider_bridge(mock_pretrained)
        assert provider.moe_layer_freq == moe_layer_freq
        exported = Qwen2MoeConfig(**Qwen2MoEBridge.megatron_to_hf_config(provider))

        expected = Qwen2MoeConfig(**(QWEN1_5_MOE_A2_7B | hf_fields))
        for key in QWEN1_5_MOE_A2_7B.keys() - {"rope_theta", "torch_dtype"}:
            assert getattr(exported, key) == getattr(expected, key), key
        assert exported.torch_dtype == expected.torch_dtype
        assert Qwen2MoEBridge.megatron_to_hf_config(provider)["rope_theta"] == 1000000.0

    def test_layer_frequency_of_megatron_is_exported(self, mock_pretrained):
        """An integer counts from layer 0, as decoder_sparse_step does not."""
        mock_pretrained.config.num_hidden_layers = 4
        provider = Qwen2MoEBridge().provider_bridge(mock_pretrained)
        provider.moe_layer_freq = 2
        exported = Qwen2MoEBridge.megatron_to_hf_config(provider)
        assert (exported["decoder_sparse_step"], exported["mlp_only_layers"]) == (1, [1, 3])

    def test_sliding_window_is_refused(self, mock_pretrained):
        mock_pretrained.config.use_sliding_window = True
        with pytest.raises(ValueError, match="full attention only"):
            Qwen2MoEBridge().provider_bridge(mock_pretrained)

    @pytest.mark.parametrize(
        ("megatron_param", "hf_param"),
        [
            ("output_layer.weight", "lm_head.weight"),
            (
                "decoder.layers.1.self_attention.linear_qkv.bias",
                {name: f"model.layers.1.self_attn.{name}_proj.bias" for name in "qkv"},
            ),
            ("decoder.layers.1.mlp.router.weight", "model.layers.1.mlp.gate.weight"),
            (
                "decoder.layers.1.mlp.linear_fc1.weight",
                {name: f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up")},
            ),
            (
                "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
                "model.layers.1.post_attention_layernorm.weight",
            ),
            (
                "decoder.layers.1.mlp.shared_experts.linear_fc2.weight",
                "model.layers.1.mlp.shared_expert.down_proj.weight",
            ),
            ("decoder.layers.1.mlp.shared_experts.gate_weight", "model.layers.1.mlp.shared_expert_gate.weight"),
            (
                "decoder.layers.1.mlp.experts.linear_fc1.weight3",
                {name: f"model.layers.1.mlp.experts.3.{name}_proj.weight" for name in ("gate", "up")},
            ),
            (
                "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight",
                "model.layers.1.mlp.experts.3.down_proj.weight",
            ),
        ],
    )
    def test_mapping_registry(self, megatron_param, hf_param):
        mapping = Qwen2MoEBridge().mapping_registry().megatron_to_hf_lookup(megatron_param)
        assert mapping is not None
        assert mapping.hf_param == hf_param
