"""A text model inside a wrapper: its settings are read as without the wrapper, and tied embeddings are detected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.hf_config import architecture_from_config, read_architecture
from nemo_upcycle.models.wrapper import INDEX


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 32}
SIZES |= {"vocab_size": 250}


def _config(kind: str, text: dict[str, Any], **whole: Any) -> dict[str, Any]:
    return {"architectures": [f"{kind}ForConditionalGeneration"], "text_config": text, **whole}


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        # A setting that transformers omits has the default of the text model's class.
        (_config("Llava", {}), {"hf_class": "LlamaForCausalLM", "ffn_size": 11008, "vocab_size": 32000}),
        (_config("Gemma3", {}), {"num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "tied_embeddings": True}),
        (_config("Qwen2_5_VL", SIZES), {"num_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 1e6, "qkv_bias": True}),
        (_config("Qwen3VL", SIZES), {"head_dim": 128, "rope_theta": 5e5, "max_positions": 128000}),
        (_config("Mistral3", {"model_type": "ministral3"}), {"num_layers": 34, "max_positions": 16384}),
        (_config("Exaone4_5_", SIZES | {"model_type": "exaone4_5_text"}), {"hf_class": "Exaone4ForCausalLM"}),
        # The first Qwen-VL models keep these settings at the top level. In a text, all axes have the same positions.
        (
            {"model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
            | SIZES
            | {"rms_norm_eps": 1e-6, "rope_theta": 2e6},
            {"rope_scaling": None, "rope_theta": 2e6, "norm_eps": 1e-6},
        ),
        # Without weights, the settings decide whether the embedding is tied. The top level has precedence.
        (_config("Llava", SIZES | {"tie_word_embeddings": True}), {"tied_embeddings": True}),
        (_config("Llava", SIZES, tie_word_embeddings=True), {"tied_embeddings": True}),
        (_config("Gemma3", SIZES, tie_word_embeddings=False), {"tied_embeddings": False}),
    ],
    ids=str,
)
def test_settings_are_those_that_transformers_takes(config: dict[str, Any], fields: dict[str, Any]) -> None:
    found = architecture_from_config(config)
    assert {name: getattr(found, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (_config("Llava", [1]), r"text_config is \[1\]; expected the settings"),
        (_config("InternVL", {"model_type": "gpt_oss"}), "class model_type gpt_oss is not supported"),
        (_config("Mistral3", SIZES, quantization_config={"quant_method": "fp8"}), r"has quantized weights \(fp8\)"),
        (_config("New", {"model_type": "qwen3"}), r"the class of its text model is Qwen3ForCausalLM\)\. .* WRAPPERS"),
        (
            {"architectures": ["Qwen4ForCausalLM"]},
            r"class Qwen4ForCausalLM is not .* nearest class is Qwen3ForCausalLM\)\. .*write a family for it",
        ),
        ({"model_type": "ministral4"}, "the nearest class is Ministral3ForCausalLM"),
        ({"architectures": ["BloomForCausalLM"]}, r"class BloomForCausalLM is not supported\. Use"),
    ],
    ids=str,
)
def test_what_is_not_known_is_said_with_what_is_near(config: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        architecture_from_config(config)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("said", [None, False, True])
@pytest.mark.parametrize("has_output", [False, True])
def test_files_say_whether_it_is_tied(tmp_path: Path, has_output: bool, said: bool | None, sharded: bool) -> None:
    names = ["language_model.model.norm.weight", *["language_model.lm_head.weight"] * has_output]
    (tmp_path / "config.json").write_text(json.dumps(_config("Mistral3", SIZES, tie_word_embeddings=said)))
    if sharded:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
    else:
        save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    assert read_architecture(tmp_path).tied_embeddings is (not has_output or bool(said))
