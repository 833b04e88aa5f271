"""For each parent family, the planner reads the published size from `config.json` and finds a layout that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.models.families import parents
from nemo_upcycle.models.wrapper import WRAPPERS
from tests.unit.cli.conftest import Command


def _config(name: str, *sizes: int, **others: Any) -> dict[str, Any]:
    """Return a `config.json` with these sizes: vocabulary, hidden size, FFN size, layers, heads, key-value heads."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    found = dict(zip((*names, "num_key_value_heads"), sizes, strict=False))
    return {"architectures": [f"{name}ForCausalLM"]} | found | others


_AFM = {"rope_type": "yarn", "factor": 20.0, "mscale": 1.0, "original_max_position_embeddings": 4096}
_YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
_PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
_FULL, _WINDOW = "full_attention", "sliding_attention"
#: Parent -> parameters in billions as on its model card, and the settings of its `config.json` that decide sizes.
PARENTS: dict[str, tuple[float, dict[str, Any]]] = {
    "Qwen3 14B": (14.8, _config("Qwen3", 151936, 5120, 17408, 40, 40, 8, head_dim=128)),
    "Mistral Small 3 24B": (
        23.6,
        _config("Mistral", 131072, 5120, 32768, 40, 32, 8, head_dim=128, sliding_window=None),
    ),
    "OLMo 2 7B": (7.30, _config("Olmo2", 100352, 4096, 11008, 32, 32)),
    "Phi-3-mini-4k": (3.82, _config("Phi3", 32064, 3072, 8192, 32, 32, 32, sliding_window=2047)),
    "SmolLM3 3B": (3.08, _config("SmolLM3", 128256, 2048, 11008, 36, 16, 4)),
    "EXAONE 4.0 32B": (
        32.0,
        _config("Exaone4", 102400, 5120, 27392, 64, 40, 8, head_dim=128, sliding_window=4096, rope_theta=1e6)
        | {"sliding_window_pattern": "LLLG", "layer_types": [*[_WINDOW] * 3, _FULL] * 16}
        | {"max_position_embeddings": 131072},
    ),
    "Granite 3.3 2B": (2.53, _config("Granite", 49152, 2048, 8192, 40, 32, 8, tie_word_embeddings=True)),
    "Granite 4.0 Micro": (  # the model card rounds to 3B
        3.40,
        _config("GraniteMoeHybrid", 100352, 2560, 8192, 40, 40, 8, tie_word_embeddings=True, num_local_experts=0)
        | {"shared_intermediate_size": 8192, "position_embedding_type": "rope", "layer_types": ["attention"] * 40},
    ),
    "OLMo 3 32B, as transformers 5 has it": (
        32.2,
        _config("Olmo3", 100278, 5120, 27648, 64, 40, 8, max_position_embeddings=65536, rope_theta=500000)
        | {"rope_parameters": {_WINDOW: _PLAIN, _FULL: _YARN | {"rope_theta": 5e5}}},
    ),
    "Gemma 3 1B": (1.0, _config("Gemma3", 262144, 1152, 6912, 26, 4, 1, head_dim=256, sliding_window=512)),
    "Qwen3.5 27B": (  # the text model only; the model card also counts the vision tower
        26.9,
        _config("Qwen3_5", 248320, 5120, 17408, 64, 24, 4, head_dim=256, max_position_embeddings=262144)
        | {"model_type": "qwen3_5_text", "linear_num_value_heads": 48, "full_attention_interval": 4}
        | {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_num_hidden_layers": 1, "mlp_only_layers": []}
        | {"rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_theta": 1e7}},
    ),
    "Ministral 3 14B": (
        13.5,
        _config("Ministral3", 131072, 5120, 16384, 40, 32, 8, head_dim=128)
        | {"rope_parameters": _YARN | {"rope_theta": 1e9}},
    ),
    "LLaVA 1.5 7B": (
        6.74,
        {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}
        | {"text_config": {"model_type": "llama", "max_position_embeddings": 4096, "vocab_size": 32064}},
    ),
    "Qwen2.5-VL 7B": (
        7.62,
        _config("Qwen2_5_VL", 152064, 3584, 18944, 28, 28, 4, rope_theta=1e6)
        | {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}
        | {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}},
    ),
    "Gemma 3 4B": (  # a text model inside a wrapper; the config omits the defaults of the text model's class
        3.88,
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
        | {"text_config": {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}},
    ),
    "InternLM3 8B": (
        8.80,
        _config("InternLM3", 128512, 4096, 10240, 48, 32, head_dim=128, bias=False, qkv_bias=False)
        | {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    ),
    "IQuest-Coder 40B": (39.8, _config("IQuestCoder", 76800, 5120, 27648, 80, 40, clip_qkv=None)),
    "EXAONE 3.5 2.4B": (
        2.40,
        {"architectures": ["ExaoneForCausalLM"], "vocab_size": 102400, "layer_norm_epsilon": 1e-5, "num_layers": 30}
        | {"hidden_size": 2560, "intermediate_size": 7168, "num_attention_heads": 32, "activation_function": "silu"}
        | {"rope_theta": 1e6, "rope_scaling": LLAMA3 | {"factor": 8}, "tie_word_embeddings": True, "head_dim": 80},
    ),
    "Seed-OSS 36B": (
        36.2,
        _config("SeedOss", 155136, 5120, 27648, 64, 80, attention_bias=True, attention_out_bias=False)
        | {"rope_theta": 1e7, "rope_scaling": {"rope_type": "default"}},
    ),
    "HyperCLOVA X SEED Think 14B": (
        14.74,
        _config("HyperCLOVAX", 110592, 6144, 14336, 38, 48, 8, head_dim=128, logits_scaling=0.125),
    ),
    "MiMo 7B": (
        7.62,  # the model card adds 0.21 billion for a multi-token prediction layer
        _config("MiMo", 151680, 4096, 11008, 36, 32, 8, attention_bias=True, num_nextn_predict_layers=1)
        | {"max_position_embeddings": 32768, "rope_theta": 640000},
    ),
    "AFM 4.5B": (
        4.62,
        _config("Arcee", 128005, 2560, 18432, 36, 20, 4, head_dim=128, max_position_embeddings=65536)
        | {"rope_scaling": _AFM},
    ),
    "Granite Swash 2B": (2.14, _config("GraniteSWA", 100352, 2560, 8192, 24, 20, 4, tie_word_embeddings=True)),
    "CWM 32B": (
        32.6,
        _config("Cwm", 128256, 6144, 21504, 64, 48, layer_types=[_FULL, *[_WINDOW] * 3] * 16)
        | {"rope_scaling": LLAMA3 | {"factor": 16.0}},
    ),
}


@pytest.mark.parametrize("name", PARENTS)
def test_a_parent_is_planned_by_its_config(name: str, tmp_path: Path, command: Command) -> None:
    billions, config = PARENTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    typed = ("plan", "--model", str(tmp_path), "--gpus", "512")
    dense, moe = command.values(*typed), command.values(*typed, "--experts", "8")
    assert [found["rows"][0]["fits"] for found in (dense, moe)] == ["fits", "fits"]
    assert dense["model"]["total_params"] / 1e9 == pytest.approx(billions, rel=0.005)


def test_every_family_has_a_parent_here() -> None:
    here = {config["architectures"][0] for _, config in PARENTS.values()} - {one.hf_class for one in WRAPPERS}
    elsewhere = {"LlamaForCausalLM", "Qwen2ForCausalLM", "GemmaForCausalLM", "NemotronHForCausalLM"}
    elsewhere |= {"Gemma4ForCausalLM"}  # not planned, because no trainer builds it
    assert {family.hf_class for family in parents()} == here | elsewhere
