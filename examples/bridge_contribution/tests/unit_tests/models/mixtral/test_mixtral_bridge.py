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

"""Unit tests for the Mixtral bridge."""

from unittest.mock import Mock

import pytest
import torch
from transformers import MixtralConfig, PretrainedConfig

from megatron.bridge.models import AutoBridge, MixtralBridge
from megatron.bridge.models.gpt.model_config import BridgeGPTModelConfig
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.models.hf_pretrained.causal_lm import PreTrainedCausalLM


MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32000,
}


class TestMixtralBridge:
    """Test cases for MixtralBridge class."""

    @pytest.fixture
    def mock_config(self):
        """Create a mock Mixtral 8x7B configuration that has these attributes and no others."""
        config = Mock(spec=[])
        for key, value in MIXTRAL_8X7B.items():
            setattr(config, key, value)
        return config

    @pytest.fixture
    def mock_pretrained(self, mock_config):
        """Create a mock PreTrainedCausalLM with the mock configuration."""
        pretrained = Mock(spec=PreTrainedCausalLM)
        pretrained.config = mock_config
        return pretrained

    def test_auto_bridge_selects_mixtral(self):
        bridge = AutoBridge.from_hf_config(PretrainedConfig(architectures=["MixtralForCausalLM"]))
        assert isinstance(bridge._model_bridge, MixtralBridge)

    @pytest.mark.parametrize("build", ["provider", "model_config"])
    def test_config_mapping(self, mock_pretrained, build):
        bridge = MixtralBridge()
        if build == "provider":
            result = bridge.provider_bridge(mock_pretrained)
            assert isinstance(result, GPTModelProvider)
        else:
            result = bridge.hf_config_to_model_config(mock_pretrained.config)
            assert isinstance(result, BridgeGPTModelConfig)

        assert result.num_layers == 32
        assert result.hidden_size == 4096
        assert result.num_attention_heads == 32
        assert result.num_query_groups == 8
        assert result.vocab_size == 32000
        assert result.seq_length == 32768
        assert result.rotary_base == 1000000.0
        assert result.position_embedding_type == "rope"
        assert result.layernorm_epsilon == 1e-05
        assert result.share_embeddings_and_output_weights is False
        assert result.params_dtype == torch.bfloat16
        assert result.bf16 is True
        assert result.normalization == "RMSNorm"
        assert result.gated_linear_unit is True
        assert result.add_bias_linear is False
        assert result.add_qkv_bias is False
        assert result.hidden_dropout == 0.0
        assert result.window_size is None
        assert result.num_moe_experts == 8
        assert result.moe_router_topk == 2
        assert result.moe_ffn_hidden_size == 14336
        assert result.moe_aux_loss_coeff == 0.02
        assert result.moe_router_pre_softmax is False
        assert result.moe_input_jitter_eps is None
        assert result.moe_grouped_gemm is True

    @pytest.mark.parametrize(
        "hf_fields",
        [
            {"sliding_window": 4096},
            {"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.001},
            {"tie_word_embeddings": True, "num_local_experts": 4, "num_experts_per_tok": 3},
        ],
    )
    def test_config_roundtrip(self, mock_pretrained, hf_fields):
        for key, value in hf_fields.items():
            setattr(mock_pretrained.config, key, value)

        provider = MixtralBridge().provider_bridge(mock_pretrained)
        exported = MixtralConfig(**MixtralBridge.megatron_to_hf_config(provider))

        expected = MixtralConfig(**(MIXTRAL_8X7B | hf_fields))
        for key in MIXTRAL_8X7B.keys() - {"rope_theta", "torch_dtype"}:
            assert getattr(exported, key) == getattr(expected, key), key
        assert exported.torch_dtype == expected.torch_dtype
        assert MixtralBridge.megatron_to_hf_config(provider)["rope_theta"] == 1000000.0

    def test_sliding_window_includes_the_token_itself(self, mock_pretrained):
        mock_pretrained.config.sliding_window = 4096
        provider = MixtralBridge().provider_bridge(mock_pretrained)
        assert tuple(provider.window_size) == (4095, 0)
        assert provider.cp_comm_type == "a2a"

    @pytest.mark.parametrize(
        ("megatron_param", "hf_param"),
        [
            ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
            ("output_layer.weight", "lm_head.weight"),
            ("decoder.final_layernorm.weight", "model.norm.weight"),
            (
                "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
                "model.layers.1.input_layernorm.weight",
            ),
            ("decoder.layers.1.pre_mlp_layernorm.weight", "model.layers.1.post_attention_layernorm.weight"),
            (
                "decoder.layers.1.self_attention.linear_qkv.weight",
                {name: f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"},
            ),
            ("decoder.layers.1.self_attention.linear_proj.weight", "model.layers.1.self_attn.o_proj.weight"),
            ("decoder.layers.1.mlp.router.weight", "model.layers.1.block_sparse_moe.gate.weight"),
            (
                "decoder.layers.1.mlp.experts.linear_fc1.weight3",
                {
                    "gate": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
                    "up": "model.layers.1.block_sparse_moe.experts.3.w3.weight",
                },
            ),
            (
                "decoder.layers.1.mlp.experts.local_experts.3.linear_fc2.weight",
                "model.layers.1.block_sparse_moe.experts.3.w2.weight",
            ),
        ],
    )
    def test_mapping_registry(self, megatron_param, hf_param):
        mapping = MixtralBridge().mapping_registry().megatron_to_hf_lookup(megatron_param)
        assert mapping is not None
        assert mapping.hf_param == hf_param
