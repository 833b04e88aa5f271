"""Shapes and parameter counts from a config.json, and refusals of unsupported models."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import CONFIG_MAPPING

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models import families
from nemo_upcycle.models.compatibility import Written, caveats
from nemo_upcycle.models.hf_config import architecture_from_config, moe_config, read_architecture
from nemo_upcycle.spec import UpcycleSpec
from tests.models import LLAMA3_8B, LLAMA3_SCALING


def test_llama_3_8b_and_its_eight_experts() -> None:
    dense = architecture_from_config(LLAMA3_8B)
    moe = dense.upcycled(UpcycleSpec(num_experts=8, top_k=2))
    assert dense.total_params == dense.active_params == 8_030_261_248
    assert (moe.total_params, moe.active_params) == (47_491_321_856, 13_668_454_400)


#: Changes to a config. The last setting of each entry is refused.
REFUSED: list[dict[str, Any]] = [
    {"num_key_value_heads": 5},
    {"num_hidden_layers": 10**6},
    {"hidden_size": 4097},
    {"hidden_act": "gelu"},
    {"head_dim": -16},
    {"rope_theta": 10**400},
    {"rope_scaling": "llama3"},
    {"partial_rotary_factor": 0.5},
    {"tie_word_embeddings": "false"},
    {"use_sliding_window": True},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 9},
    {"architectures": ["Qwen2MoeForCausalLM"], "mlp_only_layers": ["0", None]},
    {"architectures": ["GemmaForCausalLM"], "hidden_act": "gelu"},
    {"architectures": ["Gemma3ForCausalLM"], "hidden_act": None, "attn_logit_softcapping": 50.0},
    {"architectures": ["MistralForCausalLM"], "sliding_window": "wide"},
    {"architectures": ["ExaoneForCausalLM"], "num_layers": "two"},  # this class's own name for the number of layers
]


@pytest.mark.parametrize("changes", REFUSED, ids=str)
def test_a_setting_that_does_not_fit_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_from_config(LLAMA3_8B | changes)
    name, value = list(changes.items())[-1]
    assert (caught.value.subject, caught.value.got) == (f"config.json: {name}", repr(value))


@pytest.mark.parametrize(
    ("changes", "subject", "got"),
    [
        (
            {"architectures": ["Gemma2ForCausalLM"]},
            "class Gemma2ForCausalLM",
            "is not supported (the nearest class is GemmaForCausalLM)",
        ),
        ({"architectures": {"a": 1}}, "class {'a': 1}", "is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "", "has quantized weights (gptq)"),
        ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta", "500000.0"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 3}}, "rope_theta", "500000.0"),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": float("nan")}}, "rope_theta", "nan"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor", "0.25"),
        (
            {"original_max_position_embeddings": 4096, "rope_scaling": LLAMA3_SCALING},
            *("original_max_position_embeddings", "4096"),
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling: low_freq_factor",
            "is missing; expected a positive number",
        ),
        ({"rope_parameters": {"full_attention": {"a": 1}}}, "rope_parameters: full_attention", "{'a': 1}"),
        ({"rope_scaling": {"type": "default", "mrope_section": [16]}}, "rope_scaling: mrope_section", "[16]"),
        ({"rope_scaling": {"type": "mrope", "rope_type": "default"}}, "rope_scaling: type", "'mrope'"),
        ({"rope_scaling": {"rope_type": "yarm"}}, "rope_scaling: rope_type", "yarm"),
    ],
)
def test_settings_that_contradict_or_are_not_known_are_refused(changes: Any, subject: str, got: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_from_config(LLAMA3_8B | changes)
    assert (caught.value.subject, str(caught.value.got)) == (f"config.json: {subject}".rstrip(": "), got)


@pytest.mark.parametrize("content", [None, "[]", "3", "null"])
def test_a_folder_without_a_configuration_is_refused(tmp_path: Path, content: str | None) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        read_architecture(tmp_path / "nowhere")
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json holds a .*not a model's" if content else "no config"):
        read_architecture(tmp_path)


SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
#: Nemotron-H and Gemma 4 have other settings, see test_nemotron_h.py and test_gemma4.py.
PARENTS = [one.hf_class for one in families.parents() if one.model_type not in ("nemotron_h", "gemma4_text")]
TARGETS = [family.hf_class for family in families.targets() if not family.saved_as]
_WINDOWED = ("mistral", "mixtral", "phi3", "exaone4", "olmo3", "gemma3_text", "cwm", "granitemoe_swa")
#: Settings that some classes need, because their defaults describe a model that cannot be a parent.
_WANTED = {
    "GraniteMoeHybridForCausalLM": {"layer_types": ["attention"] * 32, "position_embedding_type": "rope"}
    | {"num_local_experts": 0},
    "Ministral3ForCausalLM": {
        "rope_scaling": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384}
    },
}
_NULLABLE = ("rope_theta", "rms_norm_eps", "max_position_embeddings", "hidden_act", "hidden_activation", "head_dim")
_MODEL_TYPES = {family.hf_class: family.model_type for family in (*families.parents(), *families.targets())}


def _transformers(config: dict[str, Any]) -> Any:
    """Read a configuration with transformers."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**config)


def _facts(hf: Any) -> dict[str, Any]:
    """Return the values that transformers reads from a configuration, under `Architecture`'s names."""
    names = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "relu2": "squared_relu"}
    return {
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        "tied_embeddings": hf.tie_word_embeddings,
        "activation": names[getattr(hf, "hidden_activation", None) or hf.hidden_act],
        "norm_eps": hf.rms_norm_eps,
        "rope_theta": hf.rope_theta,
        "max_positions": hf.max_position_embeddings,
        "sliding_window": hf.sliding_window if hf.model_type in _WINDOWED else None,
        "attention_out_bias": getattr(hf, "attention_out_bias", getattr(hf, "attention_bias", False)),
        "ffn_bias": getattr(hf, "mlp_bias", False),
    }


@pytest.mark.parametrize("hf_class", [name for name in (*PARENTS, *TARGETS) if _MODEL_TYPES[name] in CONFIG_MAPPING])
@pytest.mark.parametrize("said", [{}, {"num_key_value_heads": None, "sliding_window": None}], ids=["absent", "null"])
def test_defaults_of_a_config_are_those_of_transformers(hf_class: str, said: dict[str, Any]) -> None:
    config = {"architectures": [hf_class], "model_type": _MODEL_TYPES[hf_class], **said}
    config |= {name: LLAMA3_8B[name] for name in SIZES}
    config |= {"num_local_experts": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1408}
    # Glm4-MoE rotates half of a head by default.
    config |= {"n_routed_experts": 8, "partial_rotary_factor": 1.0}
    if hf_class == "Exaone4ForCausalLM":  # without a window, transformers needs explicit layer types
        config["layer_types"] = ["full_attention"] * 32
    config |= _WANTED.get(hf_class, {})
    arch = architecture_from_config(config)
    facts = _facts(_transformers(config))
    facts["num_kv_heads"] = facts["num_kv_heads"] or 32  # two of the classes keep a null and fail later
    assert {name: getattr(arch, name) for name in facts} == facts
    nulls = dict.fromkeys(_NULLABLE)
    assert architecture_from_config(nulls | config) == arch


def test_every_spelling_of_the_rotary_embedding_is_read() -> None:
    wanted = architecture_from_config(LLAMA3_8B | {"rope_theta": 7e5, "rope_scaling": LLAMA3_SCALING})
    assert (wanted.rope_theta, wanted.rope_scaling) == (7e5, LLAMA3_SCALING)
    old = {"type" if name == "rope_type" else name: value for name, value in LLAMA3_SCALING.items()}
    new = {"rope_parameters": LLAMA3_SCALING | {"rope_theta": 7e5, "partial_rotary_factor": 1.0}}
    for said in ({"rope_scaling": old}, new, new | {"rope_scaling": LLAMA3_SCALING}):
        assert architecture_from_config(LLAMA3_8B | {"rope_theta": 7e5} | said) == wanted
    assert architecture_from_config(LLAMA3_8B | {"rope_theta": None} | new) == wanted
    assert architecture_from_config(LLAMA3_8B | {"rope_scaling": {"type": "default"}}).rope_scaling is None


FINE = {"num_experts": 8, "top_k": 4, "granularity": 2, "shared_experts": 1}


def _config(hf_class: str, **changes: Any) -> dict[str, Any]:
    return LLAMA3_8B | {"architectures": [f"{hf_class}ForCausalLM"]} | changes


EVERY_2 = {"moe_layers": "every-2"}
SIGMOID = {"router_score": "sigmoid"}
GEMMA4 = {"hidden_size_per_layer_input": 0, "head_dim": 128}


def _require_good_advice(config: dict[str, Any], fields: dict[str, Any], fix: str) -> None:
    """Apply each change that a refusal advises; no change is advised twice, and each changed spec is accepted."""
    seen: list[dict[str, Any]] = []
    for text in fix.split(", or "):
        opens = {"sliding_window": None} if "config.json" in text else {}
        changes = {name: yaml.safe_load(value) for name, value in re.findall(r"(\w+)>?='?([\w-]+)", text)}
        assert opens | changes not in seen
        seen.append(opens | changes)
        if seen[-1]:
            made = architecture_from_config(config | opens).upcycled(UpcycleSpec(**(fields | changes)))
            families.require_class(made)


@pytest.mark.parametrize(
    ("config", "fields", "found"),
    [
        (
            _config("Gemma4", **GEMMA4),
            {"top_k": 1, "router_order": "softmax_topk"},
            "do not sum to one (Gemma 4",
        ),
        (_config("Llama"), SIGMOID | EVERY_2, "dense layers behind an MoE layer (Glm4-MoE)"),
        (_config("Llama"), {"routed_scaling_factor": 2.5}, "Mixtral"),
        (_config("Llama", head_dim=64), EVERY_2, "heads that do not make up the hidden size (Qwen2-MoE)"),
        (_config("Llama", mlp_bias=True), {}, "biases of the feed-forward network (Mixtral, "),
        (_config("Llama", attention_bias=True), {}, "GraniteMoeSWA"),
        (_config("Llama", attention_bias=True), EVERY_2, "a bias of the attention's output (Mixtral, "),
        (_config("Qwen3"), FINE, "shared experts (Qwen3-MoE)"),
        (_config("Mistral", sliding_window=4096), {}, "Mixtral"),
        (_config("Mistral", sliding_window=4096), EVERY_2, "a sliding window ("),
        (_config("Mistral", sliding_window=4096), FINE, "GraniteMoeSWA"),
        (_config("Mistral", sliding_window=8192), FINE, "Qwen2Moe"),  # no sequence is longer than this window
        (_config("Olmo2"), SIGMOID, "norms after attention and network (Glm4-MoE)"),
        (_config("Olmo2"), FINE, "shared experts (FlexOlmo)"),
        (_config("Granite"), {}, "GraniteMoe"),
        (_config("Granite"), SIGMOID, "Glm4Moe"),
        (_config("Granite"), EVERY_2, "Qwen2Moe"),
        (_config("Phi3", partial_rotary_factor=0.75), {}, "heads that are rotated in part (Mixtral, "),
        (_config("SmolLM3"), SIGMOID, "layers without positions (Glm4-MoE)"),
        (_config("SmolLM3", no_rope_layers=[1] * 32), {}, "Mixtral"),
    ],
    ids=str,
)
def test_a_model_has_the_first_class_that_holds_it(config: dict[str, Any], fields: dict[str, Any], found: str) -> None:
    made = architecture_from_config(config).upcycled(UpcycleSpec(**fields))
    if "(" in found:
        with pytest.raises(SpecError) as caught:
            families.require_class(made)
        assert found in str(caught.value.got)
        _require_good_advice(config, fields, caught.value.fix)
        return
    assert made.hf_class == f"{found}ForCausalLM"
    if found == "Mixtral":
        assert moe_config(config, made, 0.01)["sliding_window"] == config.get("sliding_window")


@pytest.mark.parametrize(
    ("hf_class", "fields", "opened"),
    [
        ("Mistral", SIGMOID, {"sliding_window": None}),
        ("Olmo3", {}, {"layer_types": ["full_attention"] * 32}),
        ("Gemma3", {}, None),
        ("Exaone4", {}, None),
    ],
)
def test_a_window_is_opened_if_it_helps(hf_class: str, fields: dict[str, Any], opened: dict[str, Any] | None) -> None:
    spec = UpcycleSpec(**fields)
    with pytest.raises(SpecError) as caught:
        families.require_class(architecture_from_config(_config(hf_class)).upcycled(spec))
    assert ("set sliding_window in config.json to null" in caught.value.fix) is (opened is not None)
    if opened:
        families.require_class(architecture_from_config(_config(hf_class, **opened)).upcycled(spec))


def test_servers_that_would_drop_a_bias_are_named() -> None:
    biased, plain = _config("Qwen3", attention_bias=True), _config("Qwen3")
    said, none = (
        caveats(Written(architecture_from_config(one).upcycled(UpcycleSpec()), 2)) for one in (biased, plain)
    )
    assert any(caveat.startswith("vLLM: its tokens differ from the parent's: it drops the bias") for caveat in said)
    assert none == ()


def test_a_window_unknown_to_the_parent_is_dropped() -> None:
    config = LLAMA3_8B | {"sliding_window": 16}
    assert moe_config(config, architecture_from_config(config).upcycled(UpcycleSpec()), 0.01)["sliding_window"] is None
