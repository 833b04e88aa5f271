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

"""Functional tests for Qwen2 MoE conversion, with a toy model on two GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

from tests.functional_tests.utils import autoconfig_roundtrip


REPO_ROOT = Path(__file__).resolve().parents[5]
HF_TOY_MODEL_CONFIG = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "qwen2_moe",
    "decoder_sparse_step": 2,
    "mlp_only_layers": [],
    "moe_intermediate_size": 256,
    "norm_topk_prob": False,
    "num_experts": 4,
    "qkv_bias": True,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
}
KEPT = ("num_experts", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob", "qkv_bias")


class TestQwen2MoEConversion:
    """Test Qwen2 MoE conversion of a local Hugging Face model with different parallelism configurations."""

    @pytest.fixture(scope="class")
    def toy_model_path(self, tmp_path_factory):
        """Save a Qwen2 MoE model with random weights and a tokenizer; nothing is downloaded."""
        model_dir = tmp_path_factory.mktemp("qwen2_moe_toy_model") / "qwen2_moe_toy"
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**HF_TOY_MODEL_CONFIG)).to(torch.bfloat16)
        model.save_pretrained(model_dir, safe_serialization=True)
        vocab = {"<unk>": 0, "</s>": 1, "hello": 2}
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(vocab=vocab, unk_token="<unk>")), unk_token="<unk>", eos_token="</s>"
        ).save_pretrained(model_dir)
        (model_dir / "config.json").write_text(json.dumps(HF_TOY_MODEL_CONFIG, indent=2))
        return str(model_dir)

    @pytest.mark.run_only_on("GPU")
    @pytest.mark.parametrize(
        ("tp", "pp", "ep"),
        [
            pytest.param(2, 1, 1, id="TP"),
            pytest.param(1, 2, 1, id="PP"),
            pytest.param(1, 1, 2, id="EP"),
        ],
    )
    def test_conversion_parallelism(self, toy_model_path, tmp_path, tp, pp, ep):
        cmd = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--nnodes=1",
            "-m",
            "coverage",
            "run",
            f"--data-file={REPO_ROOT / '.coverage'}",
            f"--source={REPO_ROOT}",
            "--parallel-mode",
            "examples/conversion/hf_megatron_roundtrip_multi_gpu.py",
            "--hf-model-id",
            toy_model_path,
            "--output-dir",
            str(tmp_path),
            "--tp",
            str(tp),
            "--pp",
            str(pp),
            "--ep",
            str(ep),
        ]
        result = subprocess.run(cmd, capture_output=True, text=True, cwd=REPO_ROOT)
        assert result.returncode == 0, f"STDOUT: {result.stdout}\nSTDERR: {result.stderr}"

        converted = tmp_path / Path(toy_model_path).name
        assert list(converted.glob("*.safetensors"))
        config = Qwen2MoeConfig.from_pretrained(converted)
        expected = Qwen2MoeConfig(**HF_TOY_MODEL_CONFIG)
        for key in KEPT:
            assert getattr(config, key) == getattr(expected, key), key

    @pytest.mark.run_only_on("GPU")
    def test_autoconfig_roundtrip(self, toy_model_path, tmp_path):
        autoconfig_roundtrip(toy_model_path, tmp_path)
