"""The settings of a Hugging Face `config.json`: with the defaults of its class, in one spelling, checked when read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_upcycle.errors import CheckpointError


_TANH_GELU = "gelu_pytorch_tanh"
_COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}
#: Hugging Face classes whose tensors the mapping table knows, dense and MoE, and what their configs leave unsaid: the
#: defaults of transformers' configuration classes, and what the classes fix. Without a default, heads share no keys,
#: and the head dim is their part of the hidden size.
DENSE_CLASSES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _COMMON | {"max_position_embeddings": 2048},
    "MistralForCausalLM": _COMMON
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "Qwen2ForCausalLM": _COMMON | {"num_key_value_heads": 32, "max_position_embeddings": 32768, "qkv_bias": True},
    "GemmaForCausalLM": _COMMON
    | {"hidden_act": _TANH_GELU, "tie_word_embeddings": True, "num_key_value_heads": 16, "head_dim": 256}
    | {"max_position_embeddings": 8192, "zero_centered_norm": True},
}
MOE_CLASSES: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": _COMMON
    | {"num_key_value_heads": 8, "max_position_embeddings": 131072, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    "Qwen2MoeForCausalLM": _COMMON | {"num_key_value_heads": 16, "max_position_embeddings": 32768, "qkv_bias": True},
}
_WINDOWED = ("MistralForCausalLM", "MixtralForCausalLM")
#: What transformers 5 keeps together with the scaling of rotary frequencies.
_NO_SCALING = ("rope_theta", "partial_rotary_factor")
#: Settings of a kind of scaling; those of other kinds travel along unread.
_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
#: Hugging Face's activations -> the architecture's.
ACTIVATIONS = {"silu": "silu", _TANH_GELU: "gelu_tanh"}


@dataclass(frozen=True)
class Settings:
    """A configuration's values, each checked when it is read.

    Args:
        hf_class: the one class that it is for.
        values: by name, without nulls.
        where: how messages call the file.
    """

    hf_class: str
    values: dict[str, Any]
    where: str

    def wrong(self, key: str, expected: str, fix: str = "correct config.json") -> CheckpointError:
        """Return the error that says what a value should be."""
        value = self.values.get(key)
        return CheckpointError(
            f"{self.where}: {key}", got="nothing" if value is None else repr(value), expected=expected, fix=fix
        )

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = 10**9) -> int:
        """Return a whole number; a size has no default."""
        value = self.values.get(key, default)
        if type(value) is int and value > most:
            raise self.wrong(key, f"at most {most:,}")
        if type(value) is not int or value < least:
            raise self.wrong(key, "a positive whole number" if least else "a whole number, 0 or more")
        return value

    def number(self, key: str) -> float:
        """Return a positive number."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise self.wrong(key, "a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a truth value; absent is false."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def activation(self) -> str:
        """Return the activation function, as architectures call it."""
        is_gemma = self.hf_class == "GemmaForCausalLM"
        key = "hidden_activation" if is_gemma and "hidden_activation" in self.values else "hidden_act"
        name = self.values[key]
        if not isinstance(name, str) or name not in ACTIVATIONS:
            # Gemma's first configs say gelu and mean the other one.
            gemma, other = f"Gemma was trained with {_TANH_GELU}: set that", "use a SwiGLU or GEGLU checkpoint"
            raise self.wrong(key, " or ".join(ACTIVATIONS), gemma if is_gemma else other)
        return ACTIVATIONS[name]


def _class_of(config: Any, where: str) -> str:
    if not isinstance(config, dict):
        raise CheckpointError(
            where, got=type(config).__name__, expected="a model's configuration", fix="correct config.json"
        )
    names = config.get("architectures")
    known = [*DENSE_CLASSES, *MOE_CLASSES]
    if not isinstance(names, list) or len(names) != 1 or names[0] not in known:
        raise CheckpointError(
            f"{where}: architectures",
            got=names or "nothing",
            expected=f"a Llama-family model ({', '.join(known)})",
            fix="use a checkpoint of one of these classes",
        )
    return str(names[0])


def settings_of(config: Any, where: str) -> Settings:
    """Return the settings of a parsed `config.json`, as transformers 4 or 5 writes it, with the defaults of its class.

    Raises:
        CheckpointError: the class is not known, the weights are quantized, attention has a window in some layers only,
            or settings of the rotary embedding contradict each other.
    """
    hf_class = _class_of(config, where)
    given = Settings(hf_class, {key: value for key, value in config.items() if value is not None}, where)
    if "quantization_config" in given.values:
        quantized = given.values["quantization_config"]
        method = quantized.get("quant_method", "of some kind") if isinstance(quantized, dict) else quantized
        raise CheckpointError(
            f"{where}: quantization_config",
            got=f"quantized weights ({method})",
            expected="weights in bfloat16, float16 or float32",
            fix="use the unquantized checkpoint",
        )
    if given.flag("use_sliding_window"):
        fix = "train with sequences within the window, and set use_sliding_window to false"
        raise given.wrong("use_sliding_window", "full attention", fix)
    values = (DENSE_CLASSES | MOE_CLASSES)[hf_class] | given.values | rope_settings(config, where)
    # A null is as good as nothing, but where it says something of its own.
    if config.get("num_key_value_heads", "") is None:
        values["num_key_value_heads"] = config.get("num_attention_heads")
    if config.get("sliding_window", "") is None or hf_class not in _WINDOWED:
        values.pop("sliding_window", None)
    return Settings(hf_class, values, where)


def rope_settings(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return rotary base and scaling as transformers 4 spells them; transformers 5 has both in `rope_parameters`.

    Args:
        config: the parsed `config.json`, of any class.
        where: how messages call the file.

    Returns:
        `rope_scaling`, its kind under `rope_type`, None for no scaling; and `rope_theta`, if that is said.

    Raises:
        CheckpointError: settings contradict each other, or mean more than base and scaling.
    """
    given = Settings("", {key: value for key, value in config.items() if value is not None}, where)
    scalings = {key: _scaling(given, key) for key in ("rope_scaling", "rope_parameters") if key in given.values}
    places = [given, *(_inside(given, key) for key in scalings)]
    for key in (*_NO_SCALING, "original_max_position_embeddings"):
        said = [place for place in places if key in place.values]
        for place in said[:-1]:
            if place.values[key] != (last := said[-1]).values[key]:
                expected = f"{last.values[key]}, as in {last.where.removeprefix(f'{where}: ')}"
                raise place.wrong(key, expected, "keep one of the two in config.json")
        if said and key == "partial_rotary_factor" and said[0].values[key] != 1:
            raise said[0].wrong(key, "1 or nothing", "use a checkpoint whose heads are rotated as a whole")
    if len(scalings) == 2 and scalings["rope_scaling"] != scalings["rope_parameters"]:
        fix = "keep one of the two in config.json"
        raise given.wrong("rope_scaling", f"{scalings['rope_parameters']}, as in rope_parameters", fix)
    theta = [place.values["rope_theta"] for place in places if "rope_theta" in place.values]
    return {"rope_scaling": next(iter(scalings.values()), None)} | ({"rope_theta": theta[0]} if theta else {})


def both_ropes(theta: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """Return what a `config.json` says of the rotary embedding, spelled for transformers 4 and for transformers 5."""
    parameters = {"rope_type": "default"} | (scaling or {}) | {"rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _inside(given: Settings, key: str) -> Settings:
    values = {name: value for name, value in given.values[key].items() if value is not None}
    return Settings("", values, f"{given.where}: {key}")


def _scaling(given: Settings, key: str) -> dict[str, Any] | None:
    """Return how the rotary frequencies are scaled, its kind under `rope_type`; None for not at all."""
    scaling = given.values[key]
    kind = scaling.get("rope_type", scaling.get("type", "default")) if isinstance(scaling, dict) else None
    if not isinstance(kind, str):
        raise given.wrong(key, "null, or settings with a rope_type")
    inside = _inside(given, key)
    if inside.values.get("type", kind) != kind:
        raise inside.wrong("type", f"{kind}, as its rope_type", "keep one of the two in config.json")
    scaling = {name: value for name, value in scaling.items() if name not in ("type", *_NO_SCALING)}
    for name in _SCALINGS.get(kind, ()):
        inside.number(name)
    # Settings of each kind of layer, say, or sections of the head: what is not known is never dropped.
    for name in sorted(
        inside.values.keys() - {"type", "rope_type", *_NO_SCALING, *_SCALINGS.get(kind, inside.values)}
    ):
        raise inside.wrong(name, "nothing", "remove it, if every layer and head has the same rotary embedding")
    return None if kind == "default" else scaling | {"rope_type": kind}
