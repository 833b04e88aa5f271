"""The planner knows every family's parents by their `config.json`: parameters as published, and a layout that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.models.families import parents
from nemo_upcycle.models.wrapper import WRAPPERS
from tests.unit.cli.conftest import Command


def _sizes(hidden: int, ffn: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, ffn, layers, heads), strict=True)) | others


_AFM = {"rope_type": "yarn", "factor": 20.0, "mscale": 1.0, "original_max_position_embeddings": 4096}
#: Parent -> its `config.json` as far as it decides sizes, and billions of parameters as its model card has them.
PARENTS: dict[str, tuple[dict[str, Any], float]] = {
    "Qwen3 14B": (
        {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6}
        | _sizes(5120, 17408, 40, 40, num_key_value_heads=8, max_position_embeddings=40960),
        14.8,
    ),
    "Mistral Small 3 24B": (
        {"architectures": ["MistralForCausalLM"], "vocab_size": 131072, "sliding_window": None, "head_dim": 128}
        | _sizes(5120, 32768, 40, 32, num_key_value_heads=8, max_position_embeddings=32768, rope_theta=1e8),
        23.6,
    ),
    "OLMo 2 7B": (
        {"architectures": ["Olmo2ForCausalLM"], "vocab_size": 100352, "rope_theta": 500000, "rms_norm_eps": 1e-6}
        | _sizes(4096, 11008, 32, 32, max_position_embeddings=4096),
        7.30,
    ),
    "Phi-3-mini-4k": (
        {"architectures": ["Phi3ForCausalLM"], "vocab_size": 32064, "sliding_window": 2047}
        | _sizes(3072, 8192, 32, 32, num_key_value_heads=32),
        3.82,
    ),
    "SmolLM3 3B": (
        {"architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "rope_theta": 5e6}
        | _sizes(2048, 11008, 36, 16, num_key_value_heads=4, max_position_embeddings=65536),
        3.08,
    ),
    "EXAONE 4.0 32B": (
        {"architectures": ["Exaone4ForCausalLM"], "vocab_size": 102400, "head_dim": 128, "rope_theta": 1e6}
        | _sizes(5120, 27392, 64, 40, num_key_value_heads=8, sliding_window=4096, sliding_window_pattern="LLLG")
        | {"layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16, "max_position_embeddings": 131072},
        32.0,
    ),
}
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
_PLAIN = {"rope_type": "default", "rope_theta": 5e5}
PARENTS |= {
    "Granite 3.3 2B": (
        {"architectures": ["GraniteForCausalLM"], "vocab_size": 49152, "tie_word_embeddings": True}
        | {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}
        | _sizes(2048, 8192, 40, 32, num_key_value_heads=8, attention_multiplier=0.015625),
        2.53,
    ),
    "Granite 4.0 Micro": (  # its card says 3B
        {"architectures": ["GraniteMoeHybridForCausalLM"], "vocab_size": 100352, "num_key_value_heads": 8}
        | {"embedding_multiplier": 12, "residual_multiplier": 0.22, "logits_scaling": 10, "rope_theta": 1e7}
        | {"num_local_experts": 0, "shared_intermediate_size": 8192, "position_embedding_type": "rope"}
        | {"layer_types": ["attention"] * 40, "attention_multiplier": 0.015625, "tie_word_embeddings": True}
        | _sizes(2560, 8192, 40, 40),
        3.40,
    ),
    "OLMo 3 32B, as transformers 5 has it": (
        {"architectures": ["Olmo3ForCausalLM"], "vocab_size": 100278, "rope_theta": 500000, "rms_norm_eps": 1e-6}
        | _sizes(5120, 27648, 64, 40, num_key_value_heads=8, max_position_embeddings=65536)
        | {"rope_parameters": {"sliding_attention": _PLAIN, "full_attention": _YARN | {"rope_theta": 5e5}}},
        32.2,
    ),
    "Gemma 3 1B": (
        {"architectures": ["Gemma3ForCausalLM"], "vocab_size": 262144, "sliding_window": 512}
        | _sizes(1152, 6912, 26, 4, num_key_value_heads=1, head_dim=256, max_position_embeddings=32768),
        1.0,
    ),
    "Qwen3.5 27B": (  # the text model: its card counts the vision tower, too
        {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "vocab_size": 248320}
        | {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "mlp_only_layers": []}
        | {"linear_num_value_heads": 48, "full_attention_interval": 4, "max_position_embeddings": 262144}
        | {"rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_theta": 1e7}}
        | _sizes(5120, 17408, 64, 24, num_key_value_heads=4, head_dim=256),
        26.9,
    ),
    "Ministral 3 14B": (
        {"architectures": ["Ministral3ForCausalLM"], "vocab_size": 131072, "num_key_value_heads": 8}
        | _sizes(5120, 16384, 40, 32, head_dim=128, rope_parameters=_YARN | {"rope_theta": 1e9}),
        13.5,
    ),
}
#: The same of text models among other parts, which write what is not their class's default.
PARENTS |= {
    "Gemma 3 4B": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
        | {"text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}},
        3.88,
    ),
    "LLaVA 1.5 7B": (
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
        | {"text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}},
        6.74,
    ),
    "Qwen2.5-VL 7B": (
        {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vocab_size": 152064, "num_key_value_heads": 4}
        | _sizes(3584, 18944, 28, 28, rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]}, rope_theta=1e6),
        7.62,
    ),
}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
PARENTS |= {
    "InternLM3 8B": (
        {"architectures": ["InternLM3ForCausalLM"], "vocab_size": 128512, "bias": False, "qkv_bias": False}
        | _sizes(4096, 10240, 48, 32, head_dim=128, rope_scaling={"rope_type": "dynamic", "factor": 6.0}),
        8.80,
    ),
    "IQuest-Coder 40B": (
        {"architectures": ["IQuestCoderForCausalLM"], "vocab_size": 76800}
        | _sizes(5120, 27648, 80, 40, clip_qkv=None),
        39.8,
    ),
    "EXAONE 3.5 2.4B": (
        {"architectures": ["ExaoneForCausalLM"], "vocab_size": 102400, "layer_norm_epsilon": 1e-5, "num_layers": 30}
        | {"hidden_size": 2560, "intermediate_size": 7168, "num_attention_heads": 32, "activation_function": "silu"}
        | {"rope_theta": 1e6, "rope_scaling": LLAMA3 | {"factor": 8}, "tie_word_embeddings": True, "head_dim": 80},
        2.40,
    ),
    "Seed-OSS 36B": (
        {"architectures": ["SeedOssForCausalLM"], "vocab_size": 155136, "attention_bias": True, "rope_theta": 1e7}
        | _sizes(5120, 27648, 64, 80, attention_out_bias=False, rope_scaling={"rope_type": "default"}),
        36.2,
    ),
    "HyperCLOVA X SEED Think 14B": (
        {"architectures": ["HyperCLOVAXForCausalLM"], "vocab_size": 110592, "logits_scaling": 0.125}
        | _sizes(6144, 14336, 38, 48, num_key_value_heads=8, head_dim=128),
        14.74,
    ),
    "AFM 4.5B": (
        {"architectures": ["ArceeForCausalLM"], "vocab_size": 128005, "rope_scaling": _AFM}
        | _sizes(2560, 18432, 36, 20, num_key_value_heads=4, head_dim=128, max_position_embeddings=65536),
        4.62,
    ),
    "CWM 32B": (
        {"architectures": ["CwmForCausalLM"], "vocab_size": 128256, "rope_scaling": LLAMA3 | {"factor": 16.0}}
        | _sizes(6144, 21504, 64, 48, layer_types=["full_attention", *["sliding_attention"] * 3] * 16),
        32.6,
    ),
}


@pytest.mark.parametrize("name", PARENTS)
def test_a_parent_is_planned_by_its_config(name: str, tmp_path: Path, command: Command) -> None:
    config, billions = PARENTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    typed = ("plan", "--model", str(tmp_path), "--gpus", "512")
    dense, moe = command.values(*typed), command.values(*typed, "--experts", "8")
    assert [found["rows"][0]["fits"] for found in (dense, moe)] == ["fits", "fits"]
    assert dense["model"]["total_params"] / 1e9 == pytest.approx(billions, rel=0.005)


def test_every_family_has_a_parent_here() -> None:
    here = {config["architectures"][0] for config, _ in PARENTS.values()} - {one.hf_class for one in WRAPPERS}
    elsewhere = {"LlamaForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "NemotronHForCausalLM"}
    elsewhere |= {"Gemma4ForCausalLM"}  # which is not planned: no trainer builds it
    assert {family.hf_class for family in parents()} == here | elsewhere
