"""Shapes and counts from a config.json, and the refusal of what is no Llama."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models import families
from nemo_upcycle.models.activation import activation_of
from nemo_upcycle.models.hf_config import architecture_from_config, moe_config, read_architecture
from nemo_upcycle.spec import UpcycleSpec
from tests.models import LLAMA3_8B


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def test_llama_3_8b_and_its_eight_experts() -> None:
    dense = architecture_from_config(LLAMA3_8B)
    moe = dense.upcycled(UpcycleSpec(num_experts=8, top_k=2))
    assert dense.total_params == dense.active_params == 8_030_261_248
    assert (moe.total_params, moe.active_params) == (47_491_321_856, 13_668_454_400)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": []}, ["architectures", "nothing"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads", "5", "32"]),
        ({"vocab_size": "many"}, ["vocab_size", "many"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_hidden_layers": 10**6}, ["num_hidden_layers: got 1000000, expected at most 10,000"]),
        ({"intermediate_size": 10**12}, ["intermediate_size: got 1000000000000"]),
        ({"rope_theta": 10**400}, ["rope_theta: got 1000"]),
        ({"hidden_size": 4097}, ["hidden_size: got 4097, expected a multiple of num_attention_heads (32)"]),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 9},
            ["num_experts_per_tok: got 9, expected at most 8"],
        ),
        (
            {"architectures": ["Qwen2MoeForCausalLM"], "mlp_only_layers": ["0", None]},
            ["mlp_only_layers: got ['0', None], expected a list of layer numbers, 0 to"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"hidden_act": []}, ["hidden_act: got []", "silu"]),
        ({"architectures": {"a": 1}}, ["architectures: got {'a': 1}"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures: got LlamaForCausalLM"]),
        ({"head_dim": "16"}, ["head_dim: got '16'", "a positive whole number"]),
        ({"head_dim": -16}, ["head_dim: got -16"]),
        ({"max_position_embeddings": 0.5}, ["max_position_embeddings: got 0.5"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps: got 'small'", "a positive number"]),
        ({"rope_theta": float("inf")}, ["rope_theta: got inf"]),
        ({"tie_word_embeddings": "false"}, ["tie_word_embeddings: got 'false'", "true or false"]),
        ({"rope_scaling": "llama3"}, ["rope_scaling: got 'llama3'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling: low_freq_factor: got nothing"]),
        ({"use_sliding_window": True}, ["use_sliding_window: got True", "full attention"]),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            ["layer_types: got ['full_attention', 'sliding_attention']", "full_attention alone"],
        ),
        (
            {"architectures": ["GemmaForCausalLM"], "num_key_value_heads": None, "hidden_act": "gelu"},
            ["hidden_act: got 'gelu'", "Gemma was trained with gelu_pytorch_tanh"],
        ),
        ({"architectures": ["Gemma2ForCausalLM"]}, ["architectures: got", "Gemma2ForCausalLM", "Gemma3ForCausalLM"]),
        (
            {"architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "attn_logit_softcapping": 50.0},
            ["attn_logit_softcapping: got 50.0, expected none"],
        ),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "wide"}, ["sliding_window: got 'wide'"]),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            ["quantized weights (gptq)", "use the unquantized checkpoint"],
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
            ["rope_theta: got 500000.0, expected 10000.0, as in rope_parameters"],
        ),
        ({"rope_parameters": []}, ["rope_parameters: got []"]),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": float("nan")}},
            ["rope_theta: got nan, expected a positive number"],
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
            ["rope_theta: got 500000.0, expected 10000.0, as in rope_scaling"],
        ),
        (
            {"rope_theta": None}
            | {"rope_scaling": {"rope_theta": 20000.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 3}},
            ["rope_scaling: rope_theta: got 20000.0, expected 3, as in rope_parameters"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor: got 0.5, expected 1 or nothing"]),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            ["partial_rotary_factor: got 0.25, expected 1 or nothing"],
        ),
        (
            {"original_max_position_embeddings": 4096, "rope_scaling": LLAMA3_SCALING},
            ["original_max_position_embeddings: got 4096, expected 64, as in rope_scaling"],
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 500000.0}}},
            ["rope_parameters: full_attention: got {", "expected nothing"],
        ),
        ({"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}}, ["rope_scaling: mrope_section: got ["]),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, ["rope_scaling: type: got 'mrope'"]),
        ({"rope_scaling": {"rope_type": "yarm"}}, ["rope_scaling: rope_type 'yarm' does not exist", "mean 'yarn'?"]),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_by_name(changes: dict, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_from_config(LLAMA3_8B | changes)
    for word in words:
        assert word in str(caught.value)


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_architecture(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        read_architecture(tmp_path / "nowhere")


@pytest.mark.parametrize("config", [[], "text", 3, None])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, config: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"config\.json: got .*expected a model's configuration"):
        read_architecture(tmp_path)


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
#: Nemotron-H has settings of its own: test_nemotron_h.py.
PARENTS = [family.hf_class for family in families.parents() if family.model_type != "nemotron_h"]
TARGETS = [family.hf_class for family in families.targets()]
_WINDOWED = ("mistral", "mixtral", "phi3", "exaone4", "olmo3", "gemma3_text")
#: What a class wants to be told: its own defaults are of a model that is no parent.
_WANTED = {
    "GraniteMoeHybridForCausalLM": {
        **{"num_local_experts": 0, "layer_types": ["attention"] * 32, "position_embedding_type": "rope"},
    },
    "Ministral3ForCausalLM": {
        "rope_scaling": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384},
    },
}
_MODEL_TYPES = {family.hf_class: family.model_type for family in (*families.parents(), *families.targets())}


def _transformers(config: dict[str, Any]) -> Any:
    """Return the configuration as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


def _facts(hf: Any) -> dict[str, Any]:
    """Return what transformers makes of a configuration, in the words of `Architecture`."""
    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    return {
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "tied_embeddings": hf.tie_word_embeddings,
        "activation": names[getattr(hf, "hidden_activation", None) or hf.hidden_act],
        "norm_eps": hf.rms_norm_eps,
        "rope_theta": hf.rope_theta,
        "max_positions": hf.max_position_embeddings,
        "sliding_window": hf.sliding_window if hf.model_type in _WINDOWED else None,
        "attention_out_bias": getattr(hf, "attention_bias", False),
        "ffn_bias": getattr(hf, "mlp_bias", False),
    }


# transformers 4.57 has no Ministral 3.
@pytest.mark.parametrize("hf_class", [name for name in (*PARENTS, *TARGETS) if name != "Ministral3ForCausalLM"])
@pytest.mark.parametrize("said", [{}, {"num_key_value_heads": None, "sliding_window": None}], ids=["absent", "null"])
def test_what_a_config_leaves_unsaid_is_what_transformers_makes_of_it(hf_class: str, said: dict[str, Any]) -> None:
    config = {"architectures": [hf_class], "model_type": _MODEL_TYPES[hf_class], **said}
    config |= {name: LLAMA3_8B[name] for name in SIZES}
    config |= {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1408}
    config |= {"n_routed_experts": 8, "partial_rotary_factor": 1.0}  # Glm4-MoE rotates half of a head by default
    if hf_class == "Exaone4ForCausalLM":  # without a window, transformers wants to be told
        config["layer_types"] = ["full_attention"] * 32
    config |= _WANTED.get(hf_class, {})
    arch = architecture_from_config(config)
    facts = _facts(_transformers(config))
    facts["num_kv_heads"] = facts["num_kv_heads"] or 32  # two of the classes keep a null and fail later
    assert {name: getattr(arch, name) for name in facts} == facts


@pytest.mark.parametrize(
    "name", ["rope_theta", "rms_norm_eps", "max_position_embeddings", "hidden_act", "hidden_activation", "head_dim"]
)
@pytest.mark.parametrize("hf_class", PARENTS)
def test_null_is_as_good_as_absent(hf_class: str, name: str) -> None:
    config = LLAMA3_8B | {"architectures": [hf_class]} | _WANTED.get(hf_class, {})
    config.pop(name, None)
    assert architecture_from_config(config | {name: None}) == architecture_from_config(config)


@pytest.mark.parametrize(
    "beside", [{}, {"rope_theta": 700000.0, "rope_scaling": LLAMA3_SCALING}], ids=["alone", "both"]
)
def test_the_rope_parameters_of_transformers_5_are_read(beside: dict[str, Any]) -> None:
    config = {name: value for name, value in LLAMA3_8B.items() if name != "rope_theta"} | beside
    parameters = LLAMA3_SCALING | {"rope_theta": 700000.0, "partial_rotary_factor": 1.0}
    new = architecture_from_config(config | {"rope_parameters": parameters})
    assert (new.rope_theta, new.rope_scaling) == (700000.0, LLAMA3_SCALING)


def test_both_spellings_of_the_kind_of_scaling_are_one() -> None:
    old = {"type" if name == "rope_type" else name: value for name, value in LLAMA3_SCALING.items()}
    archs = [architecture_from_config(LLAMA3_8B | {"rope_scaling": scaling}) for scaling in (old, LLAMA3_SCALING)]
    assert archs[0] == archs[1]
    assert architecture_from_config(LLAMA3_8B | {"rope_scaling": {"type": "default"}}).rope_scaling is None


FINE = UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1)


@pytest.mark.parametrize("spec", [UpcycleSpec(), FINE], ids=["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("hf_class", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 700000.0}, "rms_norm_eps": 1e-4},
        {"tie_word_embeddings": True, "hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": None},
    ],
    ids=["nothing", "transformers 5", "tied"],
)
def test_the_moe_computes_with_the_settings_of_its_parent(
    hf_class: str, spec: UpcycleSpec, said: dict[str, Any]
) -> None:
    """Their classes differ in what they take for granted: Mixtral's rotary base is a hundred times Llama's."""
    config = {"architectures": [hf_class], "model_type": _MODEL_TYPES[hf_class], "sliding_window": None, **said}
    config |= {name: LLAMA3_8B[name] for name in SIZES}
    arch = architecture_from_config(config)
    written = moe_config(config, arch.upcycled(spec), 0.01)
    child = _transformers(written)
    kept = replace(arch, tied_embeddings=False)  # an MoE model is written with an output matrix of its own
    assert _facts(child) == {name: getattr(kept, name) for name in _facts(child)}
    assert child.rope_scaling == arch.rope_scaling
    said = (arch.rope_scaling or {"rope_type": "default"}) | {"rope_theta": arch.rope_theta}
    assert written["rope_parameters"] == child.rope_parameters == said
    names = ("activation", "rope_theta", "rope_scaling", "norm_eps", "max_positions", "tied_embeddings", "window")
    again = architecture_from_config(json.loads(json.dumps(written)))
    assert [getattr(again, name) for name in names] == [getattr(kept, name) for name in names]


MISTRAL = LLAMA3_8B | {"architectures": ["MistralForCausalLM"], "max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("window", "spec", "hf_class"),
    [
        (4096, UpcycleSpec(), "MixtralForCausalLM"),
        (4096, FINE, ""),
        (4096, UpcycleSpec(moe_layers="every-2"), ""),
        (8192, FINE, "Qwen2MoeForCausalLM"),
        (None, FINE, "Qwen2MoeForCausalLM"),
    ],
)
def test_a_sliding_window_needs_a_class_that_has_one(window: int | None, spec: UpcycleSpec, hf_class: str) -> None:
    made = architecture_from_config(MISTRAL | {"sliding_window": window}).upcycled(spec)
    assert made.hf_class == hf_class
    if hf_class == "MixtralForCausalLM":
        assert moe_config(MISTRAL, made, 0.01)["sliding_window"] == window


@pytest.mark.parametrize(
    ("hf_class", "spec", "fix"),
    [
        ("MistralForCausalLM", UpcycleSpec(router_score="sigmoid"), {"sliding_window": None}),
        ("Olmo3ForCausalLM", UpcycleSpec(), {"layer_types": ["full_attention"] * 32}),
        ("Gemma3ForCausalLM", UpcycleSpec(), None),
        ("Exaone4ForCausalLM", UpcycleSpec(), None),
    ],
)
def test_a_window_is_to_be_opened_where_a_class_can_then_hold_the_model(
    hf_class: str, spec: UpcycleSpec, fix: dict[str, Any] | None
) -> None:
    config = LLAMA3_8B | {"architectures": [hf_class]}
    with pytest.raises(SpecError) as caught:
        families.require_class(architecture_from_config(config).upcycled(spec))
    assert ("set sliding_window in config.json to null" in caught.value.fix) is (fix is not None)
    if fix:
        families.require_class(architecture_from_config(config | fix).upcycled(spec))


def test_a_window_that_the_parents_class_does_not_know_is_not_handed_on() -> None:
    config = LLAMA3_8B | {"sliding_window": 16}
    assert moe_config(config, architecture_from_config(config).upcycled(UpcycleSpec()), 0.01)["sliding_window"] is None


def test_activation_functions_are_told_by_what_they_compute() -> None:
    functional = torch.nn.functional
    functions = {
        "silu": (functional.silu, torch.nn.SiLU(), lambda x: x * torch.sigmoid(x)),
        "gelu": (functional.gelu, torch.nn.GELU()),
        "gelu_tanh": (torch.nn.GELU("tanh"), lambda x: functional.gelu(x, approximate="tanh")),
        "squared_relu": (lambda x: functional.relu(x) ** 2,),
        "relu": (functional.relu,),
    }
    for name, same in functions.items():
        assert [activation_of(function) for function in same] == [name] * len(same)
