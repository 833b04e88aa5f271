"""The planner knows every family's parents by their `config.json`: parameters as published, and a layout that fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli.main import main
from nemo_upcycle.models.families import parents


_LLAMA32 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 8192},
}
_QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "num_key_value_heads": 8}
_QWEN3 |= {"head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6}
_EXAONE4 = {"architectures": ["Exaone4ForCausalLM"], "vocab_size": 102400, "num_key_value_heads": 8}
_EXAONE4 |= {"head_dim": 128, "rope_theta": 1e6, "rms_norm_eps": 1e-5}


def _sizes(hidden: int, ffn: int, layers: int, heads: int, **others: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return dict(zip(names, (hidden, ffn, layers, heads), strict=True)) | others


#: Parent -> its `config.json` as far as it decides sizes, and billions of parameters as its model card has them.
PARENTS: dict[str, tuple[dict[str, Any], float]] = {
    "Llama 3.2 1B": (_LLAMA32 | _sizes(2048, 8192, 16, 32), 1.24),
    "Llama 3.2 3B": (_LLAMA32 | _sizes(3072, 8192, 28, 24), 3.21),
    "Qwen3 1.7B": (_QWEN3 | _sizes(2048, 6144, 28, 16, tie_word_embeddings=True), 1.72),
    "Qwen3 4B": (_QWEN3 | _sizes(2560, 9728, 36, 32, tie_word_embeddings=True), 4.02),
    "Qwen3 14B": (_QWEN3 | _sizes(5120, 17408, 40, 40), 14.8),
    "Qwen3 32B": (_QWEN3 | _sizes(5120, 25600, 64, 64), 32.8),
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
    "OLMo 2 32B": (
        {"architectures": ["Olmo2ForCausalLM"], "vocab_size": 100352, "rope_theta": 500000, "rms_norm_eps": 1e-6}
        | _sizes(5120, 27648, 64, 40, num_key_value_heads=8, max_position_embeddings=4096),
        32.2,
    ),
    "Phi-3-mini-4k": (
        {"architectures": ["Phi3ForCausalLM"], "vocab_size": 32064, "sliding_window": 2047}
        | _sizes(3072, 8192, 32, 32, num_key_value_heads=32),
        3.82,
    ),
    "Phi-4": (
        {"architectures": ["Phi3ForCausalLM"], "vocab_size": 100352, "sliding_window": None, "rope_theta": 250000}
        | _sizes(5120, 17920, 40, 40, num_key_value_heads=10, max_position_embeddings=16384),
        14.7,
    ),
    "SmolLM3 3B": (
        {"architectures": ["SmolLM3ForCausalLM"], "vocab_size": 128256, "rope_theta": 5e6}
        | _sizes(2048, 11008, 36, 16, num_key_value_heads=4, max_position_embeddings=65536),
        3.08,
    ),
    "EXAONE 4.0 1.2B": (
        _EXAONE4
        | _sizes(2048, 4096, 30, 32, head_dim=64, tie_word_embeddings=True, max_position_embeddings=65536)
        | {"sliding_window": None, "layer_types": ["full_attention"] * 30},
        1.28,
    ),
    "EXAONE 4.0 32B": (
        _EXAONE4
        | _sizes(5120, 27392, 64, 40, sliding_window=4096, sliding_window_pattern="LLLG")
        | {"layer_types": [*["sliding_attention"] * 3, "full_attention"] * 16, "max_position_embeddings": 131072},
        32.0,
    ),
}


@pytest.mark.parametrize("name", PARENTS)
def test_a_parent_is_planned_by_its_config(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, billions = PARENTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for more in ([], ["--experts", "8"]):
        assert main(["plan", "--model", str(tmp_path), "--gpus", "512", "--json", *more]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["rows"][0]["fits"] == "fits", found["rows"][0]
        if not more:
            assert found["model"]["total_params"] / 1e9 == pytest.approx(billions, rel=0.005)


def test_every_family_has_a_parent_here() -> None:
    here = {config["architectures"][0] for config, _ in PARENTS.values()}
    elsewhere = {"Qwen2ForCausalLM", "GemmaForCausalLM", "NemotronHForCausalLM"}
    assert {family.hf_class for family in parents()} == here | elsewhere
