"""Read a Hugging Face `config.json` as an architecture, and write the `config.json` of an MoE model."""

from __future__ import annotations

import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import Family, find_family, parents, targets
from nemo_upcycle.models.families.base import (
    ACTIVATIONS,
    FOLDED,
    FULL,
    LOCAL_BASE,
    WINDOW,
    WITHOUT_EFFECT,
    ConfigValues,
    MoeFamily,
)
from nemo_upcycle.models.families.refused import FINISH_WITH_0_2, READ_BY_0_2, REFUSED
from nemo_upcycle.models.rotary import DYNAMIC, KINDS, LONGROPE, PROPORTIONAL
from nemo_upcycle.models.wrapper import WRAPPERS, Wrapper, read_config, text_settings


_PART = "partial_rotary_factor"
#: Coefficient of the load-balancing loss if the checkpoint has none, as in the recipes and in NeMo's Mixtral.
#: transformers' own default is a tenth of this value.
ROUTER_AUX_LOSS = 0.01
#: Settings that transformers 5 stores together with the scaling of rotary frequencies.
_NO_SCALING = ("rope_theta", _PART)
#: Number of positions that a model was trained with before its rotary frequencies were scaled. For LongRoPE,
#: transformers 4 stores this number beside the settings of the scaling, and transformers 5 among these settings.
_SHORT = "original_max_position_embeddings"
#: Kind of scaling -> its settings, which are checked. Settings of kinds outside this table are passed on unchecked.
_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _SHORT),
}
#: Two classes whose names are at least this similar probably compute the same function. Ernie's and Granite's names
#: are less similar.
_CLOSE = 0.75
#: Former name of a kind of scaling -> its current name.
_FORMER = {"su": LONGROPE}


def _family_of(config: Any, where: str) -> Family:
    if not isinstance(config, dict):
        raise CheckpointError(
            where,
            kind="state",
            got=f"holds a {type(config).__name__}, not a model's configuration",
            fix="correct config.json",
        )
    names, kind = config.get("architectures"), str(config.get("model_type"))
    if names is None:  # transformers saved only the config, without a model
        family = find_family("", kind)
    else:
        family = find_family(str(names[0]), kind) if isinstance(names, list) and len(names) == 1 else None
    if family is None:
        raise _unknown(config, where)
    return family.of(config)


def _unknown(config: dict[str, Any], where: str) -> CheckpointError:
    """Return the error for an unknown class: it names the nearest known class and says how to add a class."""
    names, kind, text = config.get("architectures"), str(config.get("model_type") or ""), config.get("text_config")
    name = ", ".join(map(str, names)) if isinstance(names, list) else str(names or "")
    if reason := REFUSED.get(name):
        return CheckpointError(
            f"{where}: {name}",
            kind="refused",
            got="is not supported",
            expected=reason,
            fix="use another checkpoint" + (f". {FINISH_WITH_0_2}" if name in READ_BY_0_2 else ""),
        )
    known: list[Family | Wrapper] = [*parents(), *targets(), *WRAPPERS]
    classes = {one.hf_class.partition("For")[0].lower(): one for one in known}
    kinds = {one.model_type: one for one in known}
    inside = kinds.get(str(text.get("model_type"))) if isinstance(text, dict) else None
    near = difflib.get_close_matches(name.partition("For")[0].lower(), classes, n=1, cutoff=_CLOSE)
    near_kind = difflib.get_close_matches(kind, kinds, n=1, cutoff=_CLOSE)
    nearest = classes[near[0]] if near else kinds[near_kind[0]] if near_kind else None
    fix = "use a checkpoint of a class that nemo_upcycle.models.families lists"
    if inside:
        nearest = inside
        fix = (
            "if the wrapper does not change what its text model computes, add the class to WRAPPERS in"
            " nemo_upcycle.models.wrapper. Otherwise use another checkpoint"
        )
    elif nearest:
        fix = (
            f"if its layers compute the same as those of {nearest.hf_class}, write a family for it in"
            " nemo_upcycle.models.families. Otherwise use another checkpoint"
        )
    what = "the class of its text model" if inside else "the nearest class"
    return CheckpointError(
        f"{where}: class {' '.join(part for part in (name, kind and f'model_type {kind}') if part) or '(none)'}",
        kind="refused",
        got="is not supported" + (f" ({what} is {nearest.hf_class})" if nearest else ""),
        fix=fix,
    )


def architecture_from_config(config: dict[str, Any], where: str = "config.json") -> Architecture:
    """Return the architecture that a Hugging Face configuration of transformers 4 or 5 describes.

    If the model has other parts beside a text model, return the architecture of the text model.

    Args:
        config: the parsed `config.json`.
        where: name of the file in messages.

    Raises:
        CheckpointError: the class is unknown, the weights are quantized, a size is missing, a value has the wrong
            type, or values contradict each other.
    """
    family, given = _values_of(text_settings(config, where), where)
    heads, hidden = (given.whole(key) for key in ("num_attention_heads", "hidden_size"))
    mamba = family.mamba(given)
    layers = given.whole("num_hidden_layers", len(mamba.pattern) if mamba else None, most=10_000)
    if mamba and len(mamba.pattern) != layers:
        raise given.wrong(
            "num_hidden_layers", f"{len(mamba.pattern)}, the number of layers in the pattern {mamba.pattern}"
        )
    if hidden % heads and "head_dim" not in given.values:
        raise given.wrong("hidden_size", f"a multiple of num_attention_heads ({heads}), unless head_dim is given")
    groups = given.whole("num_key_value_heads", heads)
    if heads % groups:
        raise given.wrong("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    bias = given.flag("attention_bias")
    part = given.number(_PART) if _PART in given.values else 1.0
    if part != 1 and not family.has_partial_rotary:
        raise given.wrong(_PART, "1, or no value", "use a checkpoint whose heads are rotated as a whole")
    if (norms := given.flag("qk_norm")) and "query_norm" not in family.names:
        raise given.wrong(
            "qk_norm", f"no norms of query and key in {family.hf_class}", "use a checkpoint of Qwen3's class"
        )
    architecture = Architecture(
        hf_class=family.hf_class,
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=given.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=given.whole("head_dim", hidden // heads),
        vocab_size=given.whole("vocab_size"),
        tied_embeddings=given.flag("tie_word_embeddings"),
        activation=family.activation(given),
        gated=family.gated,
        qkv_bias=bias or given.flag("qkv_bias"),
        attention_out_bias=bias,
        ffn_bias=given.flag("mlp_bias"),
        qk_norm=norms,
        wide_qk_norm=family.wide_qk_norm,
        pre_norm=family.pre_norm,
        post_norm=family.post_norm,
        zero_centered_norm=given.flag("zero_centered_norm"),
        scaled_embedding=given.flag("scaled_embedding"),
        norm_eps=given.number("rms_norm_eps"),
        rope_theta=given.number("rope_theta"),
        rope_scaling=given.values["rope_scaling"],
        rotary_percent=part,
        max_positions=given.whole("max_position_embeddings"),
        sliding_window=given.whole("sliding_window") if "sliding_window" in given.values else None,
        mamba=mamba,
    )
    return replace(architecture, **family.attention(given, layers), **family.experts(given, layers))


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture of a Hugging Face folder.

    Args:
        folder: Hugging Face folder with `config.json`.

    Raises:
        CheckpointError: the folder or its `config.json` is missing, or the file describes no model of a known class.

    Example:
        >>> read_architecture(Path("runs/demo/dense")).num_layers  # doctest: +SKIP
        30
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"Model folder {folder}",
            kind="missing",
            got="has no config.json" if folder.is_dir() else "does not exist",
            fix="give a Hugging Face folder with config.json and *.safetensors",
        )
    return architecture_from_config(read_config(folder), str(path))


def trained_architecture(folder: Path) -> Architecture:
    """Return the architecture of the Megatron model that this package exported to a Hugging Face folder.

    The model may have settings that are folded into the weights of the folder, see `models/folding.py`.

    Args:
        folder: Hugging Face folder with `config.json`.

    Raises:
        CheckpointError: as in `read_architecture`, or a folded setting has a value of the wrong kind.
    """
    arch, config = read_architecture(folder), ConfigValues(read_config(folder), str(folder / "config.json"))
    folded: dict[str, Any] = {}
    for name in [name for name in WITHOUT_EFFECT if FOLDED + name in config.values]:
        read = config.flag if isinstance(WITHOUT_EFFECT[name], bool) else config.number
        folded[name] = read(FOLDED + name)
    return replace(arch, **folded)


def _values_of(config: Any, where: str) -> tuple[Family, ConfigValues]:
    """Return the family and the settings, with defaults, of a parsed `config.json` of transformers 4 or 5.

    Raises:
        CheckpointError: the class is unknown, the weights are quantized, attention has a window in some layers only,
            or settings of the rotary embedding contradict each other.
    """
    family = _family_of(config, where)
    config = {family.spelling.get(key, key): value for key, value in config.items()}
    given = _given(config, where, family)
    if "quantization_config" in given.values:
        quantized = given.values["quantization_config"]
        method = quantized.get("quant_method", "of some kind") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            where,
            kind="refused",
            got=f"has quantized weights ({method})",
            fix="use the checkpoint in bfloat16, float16 or float32",
        )
    if given.flag("use_sliding_window"):
        fix = "train with sequences within the window, and set use_sliding_window to false"
        raise given.wrong("use_sliding_window", "full attention", fix)
    values = {**family.defaults, **given.values, **rope_settings(config, where)}
    if LOCAL_BASE in values and LOCAL_BASE not in family.defaults:
        raise given.wrong("rope_parameters", "the same for every kind of layer", "use another checkpoint")
    if (scaling := values["rope_scaling"]) and scaling["rope_type"] == LONGROPE:
        length = values.get(_SHORT, values.get("max_position_embeddings"))
        values["rope_scaling"] = {_SHORT: length} | scaling
    # Treat null as absent, except for these keys, where null has a meaning.
    if config.get("num_key_value_heads", "") is None:
        values["num_key_value_heads"] = config.get("num_attention_heads")
    if config.get("sliding_window", "") is None or not family.has_window:
        values.pop("sliding_window", None)
    return family, ConfigValues(values, where, family.spelling)


def _given(config: dict[str, Any], where: str, family: Family | None = None) -> ConfigValues:
    values = {key: value for key, value in config.items() if value is not None}
    return ConfigValues(values, where, family.spelling if family else {})


def rope_settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return rotary base and scaling under transformers 4's names. transformers 5 has both in `rope_parameters`.

    Args:
        config: the parsed `config.json`, of any class.
        where: name of the file in messages.

    Returns:
        `rope_scaling`, with its kind under `rope_type`; None for no scaling. `rope_theta`, `partial_rotary_factor` and
        `rope_local_base_freq`, if the file has them.

    Raises:
        CheckpointError: settings contradict each other, or change more than base and scaling.
    """
    config = _one_rope(config)
    given = _given(config, where)
    scalings = {key: _scaling(given, key) for key in ("rope_scaling", "rope_parameters") if key in given.values}
    places = [given, *(_inside(given, key) for key in scalings)]
    for key in (*_NO_SCALING, _SHORT):
        said = [place for place in places if key in place.values]
        for place in said[:-1]:
            if place.values[key] != (last := said[-1]).values[key]:
                expected = f"{last.values[key]}, as in {last.where.removeprefix(f'{where}: ')}"
                raise place.wrong(key, expected, "keep one of the two in config.json")
    if len(scalings) == 2 and scalings["rope_scaling"] != scalings["rope_parameters"]:
        fix = "keep one of the two in config.json"
        raise given.wrong("rope_scaling", f"{scalings['rope_parameters']}, as in rope_parameters", fix)
    said_of = {key: place.values[key] for key in _NO_SCALING for place in places if key in place.values}
    said_of |= {LOCAL_BASE: given.values[LOCAL_BASE]} if LOCAL_BASE in given.values else {}
    return {"rope_scaling": next(iter(scalings.values()), None), **said_of}


def _one_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Merge the rotary embeddings of transformers 5, one for each kind of layer, into one. Return the configuration.

    Layers with a window may have another base, which is returned under transformers 4's name. The frequencies of these
    layers must not be scaled.
    """
    kinds = config.get("rope_parameters")
    if isinstance(kinds, dict) and kinds.keys() > {FULL, WINDOW}:  # transformers 5.12 adds an empty default
        kinds = {key: value for key, value in kinds.items() if value not in (None, "default")}
    if not isinstance(kinds, dict) or kinds.keys() != {FULL, WINDOW}:
        return config
    local = kinds[WINDOW]
    if local == kinds[FULL]:
        return config | {"rope_parameters": local}
    if not isinstance(local, dict) or local.get("rope_type", "default") != "default" or "rope_theta" not in local:
        return config
    return config | {"rope_parameters": kinds[FULL], LOCAL_BASE: local["rope_theta"]}


def both_ropes(theta: float, scaling: dict[str, Any] | None, part: float | None = None) -> dict[str, Any]:
    """Return the settings of a rotary embedding in `config.json`, for both transformers 4 and 5.

    Args:
        theta: base of the frequencies.
        scaling: result of `rope_settings`.
        part: rotated share of a head, for a class that does not rotate the whole head by default.
    """
    parameters = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}
    parameters |= {} if part is None else {_PART: part}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def moe_config(dense_config: dict[str, Any], arch: Architecture, router_aux_loss: float | None) -> dict[str, Any]:
    """Return the `config.json` of an upcycled model: the parent's settings, plus the settings of the experts.

    Special tokens and similar settings do not change. Every setting that decides the function is written, for both
    transformers 4 and 5, because the MoE class may have other defaults than the parent's class.

    Args:
        dense_config: the parent's `config.json`.
        arch: architecture of the MoE model, which a Hugging Face class can hold.
        router_aux_loss: coefficient of the load-balancing loss; None for the parent's coefficient, or for
            `ROUTER_AUX_LOSS` if the parent has no coefficient.
    """
    family = find_family(arch.hf_class)
    assert isinstance(family, MoeFamily), arch.hf_class
    parent = _family_of(dense_config, "config.json")
    settings = family.expert_settings(arch)
    dropped = {"attention_bias", "mlp_bias", "hidden_activation", "layer_types", _PART}
    dropped |= {*parent.spelling, *parent.own_settings, *WITHOUT_EFFECT, *(FOLDED + name for name in WITHOUT_EFFECT)}
    scaling = arch.rope_scaling or {}
    # Do not write a number that equals max_position_embeddings: classes use this number by default, and writing it
    # overrides a factor.
    is_beside = scaling.get("rope_type") == LONGROPE and scaling[_SHORT] != arch.max_positions
    ropes = both_ropes(arch.rope_theta, arch.rope_scaling, settings.get(_PART))
    if "rope_parameters" in settings:  # one rotary embedding for each kind of layer
        dropped |= ropes.keys()
        ropes = {}
    return {
        **{key: value for key, value in dense_config.items() if key not in dropped},
        "architectures": [family.saved_as or arch.hf_class],
        "num_experts_per_tok": arch.top_k,
        "head_dim": arch.head_dim,
        "num_key_value_heads": arch.num_kv_heads,
        "rms_norm_eps": arch.norm_eps,
        "tie_word_embeddings": False,  # see `as_written` in models/mapping.py
        "hidden_act": next(name for name, kind in ACTIVATIONS.items() if kind == arch.activation),
        "max_position_embeddings": arch.max_positions,
        "output_router_logits": False,
        "router_aux_loss_coef": _aux_loss(dense_config) if router_aux_loss is None else router_aux_loss,
        "model_type": family.model_type,
        "vocab_size": arch.vocab_size,
        "num_hidden_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "num_attention_heads": arch.num_heads,
        **({_SHORT: scaling[_SHORT]} if is_beside else {}),
        **{FOLDED + name: value for name, value in family.folded(arch).items()},
        **ropes,
        **settings,
    }


def _aux_loss(config: dict[str, Any]) -> Any:
    """Return the load-balancing coefficient in the `config.json` of a parent with experts, or `ROUTER_AUX_LOSS`."""
    said = config.get("router_aux_loss_coef")
    return ROUTER_AUX_LOSS if said is None else said


def _inside(given: ConfigValues, key: str) -> ConfigValues:
    return _given(given.values[key], f"{given.where}: {key}")


def _scaling(given: ConfigValues, key: str) -> dict[str, Any] | None:
    """Return the scaling of the rotary frequencies, with its kind under `rope_type`; None for no scaling."""
    scaling = given.values[key]
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else None
    if not isinstance(kind, str):
        raise given.wrong(key, "null, or settings with a rope_type")
    inside = _inside(given, key)
    if inside.values.get("type", kind) != kind:
        raise inside.wrong("type", f"{kind}, as its rope_type", "keep one of the two in config.json")
    kind = _FORMER.get(kind, kind)
    if kind not in (known := (*KINDS, DYNAMIC, PROPORTIONAL)):
        raise CheckpointError.unknown(f"{inside.where}: rope_type", kind, known)
    scaling = {name: value for name, value in scaling.items() if name not in ("type", *_NO_SCALING)}
    for name in _SCALINGS.get(kind, ()):
        inside.number(name)
    known_names = {"type", "rope_type", *_NO_SCALING, *_SCALINGS.get(kind, inside.values)}
    # An unknown setting may apply only to some kinds of layers or some sections of a head, so it is not dropped.
    for name in sorted(inside.values.keys() - known_names):
        raise inside.wrong(name, "nothing", "remove it if every layer and head has the same rotary embedding")
    return None if kind == "default" else scaling | {"rope_type": kind}
