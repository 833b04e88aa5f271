"""Model families: one record per Hugging Face class, with everything that is special about the class."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.architecture_parts import MambaLayers


TANH_GELU = "gelu_pytorch_tanh"
#: Names in `layer_types` for a layer with windowed attention and for a layer with full attention.
WINDOW, FULL = "sliding_attention", "full_attention"
#: Setting for a separate base of the rotary embedding in layers with a window. Only classes that have a default for
#: this setting read it.
LOCAL_BASE = "rope_local_base_freq"
#: Name of an activation in Hugging Face -> name in an architecture.
ACTIVATIONS = {"silu": "silu", TANH_GELU: "gelu_tanh", "swish": "silu"}
#: Name of an activation in Hugging Face -> name in an architecture, for networks without a gate.
SQUARED_RELU = {"relu2": "squared_relu"}
#: Start of the name of a layer's tensor, up to the layer number.
_NUMBERED = re.compile(r"model\.(?P<mtp>mtp_)?layers\.(?P<number>\d+)\.")
#: Fields of an `Architecture` that say which layers have a feature. Only a few classes support such fields.
_PATTERNS = ("rope_pattern", "window_pattern")
#: Megatron's kind of softmax in which every head has an attention sink.
LEARNABLE = "learnable"
#: Key that this package adds to `config.json`. Its value lists the parts that the class requires and the model lacks:
#: `shared_expert`, `shared_gate`, `qkv_bias`, `attention_out_bias`, `balancing_bias`, `sinks`. The folder holds
#: constants without effect for these parts, most of them zeros.
ZERO_FILLED = "zero_filled"
#: Start of keys that this package adds to `config.json`. Each key has the trained model's value of a setting that the
#: class lacks, see `MoeFamily.folded`.
FOLDED = "folded_"
_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
#: Field of an `Architecture` that weights can contain -> value of the field without effect.
WITHOUT_EFFECT: dict[str, Any] = {
    "routed_scaling_factor": 1.0,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "scaled_embedding": False,
    "zero_centered_norm": False,
}
#: Defaults that transformers' configuration classes of the Llama family share. By default, there are also as many
#: key-value heads as heads, and the head dim is the hidden size divided by the number of heads.
COMMON_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
}


@dataclass(frozen=True)
class ConfigValues:
    """The values of a Hugging Face `config.json`, each checked when it is read.

    Args:
        values: settings under Llama's names, without nulls.
        where: name of the file in messages.
        spelling: the file's name of a setting -> Llama's name, if the names differ.
    """

    values: dict[str, Any]
    where: str
    spelling: Mapping[str, str] = field(default_factory=dict)

    def wrong(self, key: str, expected: str, fix: str = "correct config.json") -> CheckpointError:
        """Return the error that says what a value should be."""
        value = self.values.get(key)
        spelled = next((own for own, llama in self.spelling.items() if llama == key), key)
        if value is None:
            got = f"is missing; expected {expected}"
            return CheckpointError(f"{self.where}: {spelled}", kind="missing", got=got, fix=fix)
        return CheckpointError(f"{self.where}: {spelled}", got=repr(value), expected=expected, fix=fix)

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = 10**9) -> int:
        """Return a whole number. A missing value without a default is an error."""
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
        """Return true or false. A missing value is false."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def choice(self, key: str, choices: Mapping[str, str], fix: str) -> str:
        """Return the entry of `choices` that the setting names."""
        name = self.values.get(key)
        if not isinstance(name, str) or name not in choices:
            raise self.wrong(key, " or ".join(choices), fix)
        return choices[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A Hugging Face class: how to read its `config.json`, and the names of its tensors.

    If a Hugging Face class differs from Llama only in names and defaults, create an instance of `Family`. If the class
    reads a setting differently, override the method that reads the setting. The tensors must be Llama's, separate or
    fused. A fused tensor has the rows of query, key and value, or of gate and up projection, one below the other.

    Args:
        title: name of the family in messages.
        hf_class: class in `architectures`.
        model_type: `model_type` in `config.json`.
        names: role in the mapping table -> names of the tensors, one name for each part of the role's `ParamMapping`.
            Parts in the same tensor have the same name. `{layer}` and `{expert}` stand for numbers. `[{expert}]` at
            the end marks one expert's slice of a tensor with all experts, and `[{expert}].T` marks a transposed slice.
        defaults: values of settings that `config.json` omits, under Llama's names. These values are defaults of
            transformers' configuration class, or fixed by the class (`qkv_bias`, `zero_centered_norm`,
            `scaled_embedding`).
        spelling: the class's name of a setting -> Llama's name, if the names differ.
        pre_norm: whether there are norms before attention and network (`attention_norm`, `ffn_norm`).
        post_norm: whether there are norms after attention and network (`attention_post_norm`, `ffn_post_norm`).
        wide_qk_norm: whether query and key are normalised over all heads at once.
        gated: whether networks have a gate. If not, only the last name of `fc1` is used.
        has_window: whether the class reads `sliding_window`.
        has_partial_rotary: whether the class reads `partial_rotary_factor`, the rotated share of each head.
        has_multipliers: whether settings of the class multiply embedding, scores, residual branches and logits.
        layer_patterns: fields of an `Architecture` that the class supports for features of only some layers.
        nemo_module: NeMo's module with the configuration of such models, or this package's module if NeMo has no such
            module.
        hf_factors: role -> factor that turns the Megatron parameter into the Hugging Face tensor, if the factor is not
            1. Ignored if the model's shared experts have a gate.
        hf_offsets: role -> number to add to the Megatron parameter to get the Hugging Face tensor, if the number is
            not 0.
        has_mtp: whether checkpoints may hold layers for multi-token prediction, which this package omits.
        constant_values: end of a constant's name -> value of the constant, if the value is not zero.
        own_settings: settings that `config.json` of an MoE omits, because another class would misread them.
        saved_as: class in `architectures`, if a dense and an MoE family share the class.
        computed_as: transformers class that computes the model, if transformers has no class `hf_class`. The newest
            releases of transformers know the `model_type` and save the model under the class that computes it.

    Example:
        >>> from nemo_upcycle.models.families import llama, register
        >>> mine = replace(llama.FAMILY, title="Mine", hf_class="MineForCausalLM")  # doctest: +SKIP
        >>> register(mine)  # doctest: +SKIP
    """

    title: str
    hf_class: str
    model_type: str
    names: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, Any]
    spelling: Mapping[str, str] = field(default_factory=dict)
    pre_norm: bool = True
    post_norm: bool = False
    wide_qk_norm: bool = False
    gated: bool = True
    has_window: bool = False
    has_partial_rotary: bool = False
    has_multipliers: bool = False
    layer_patterns: tuple[str, ...] = ()
    nemo_module: str = ""
    hf_factors: Mapping[str, float] = field(default_factory=dict)
    hf_offsets: Mapping[str, float] = field(default_factory=dict)
    constant_values: Mapping[str, float] = field(default_factory=dict)
    has_mtp: bool = False
    own_settings: tuple[str, ...] = ()
    saved_as: str = ""
    computed_as: str = ""

    def of(self, config: Mapping[str, Any]) -> Family:
        """Return the family for a configuration: this family, unless the class has both a dense and an MoE family."""
        return self

    def activation(self, config: ConfigValues) -> str:
        """Return the name of the activation function in an architecture.

        Raises:
            CheckpointError: the activation is unknown.
        """
        if not self.gated:
            return config.choice("hidden_act", SQUARED_RELU, "use a checkpoint with squared ReLU")
        return config.choice("hidden_act", ACTIVATIONS, "use a SwiGLU or GEGLU checkpoint")

    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """Return the `Architecture` fields in which attention differs from Llama's attention.

        Raises:
            CheckpointError: a layer has an unknown type of attention.
        """
        self._layer_types(config, num_layers, (WINDOW if "sliding_window" in config.values else FULL,))
        return multipliers(config) if self.has_multipliers else {}

    @staticmethod
    def _pattern(holds: Iterable[bool]) -> tuple[bool, ...] | None:
        """Return a layer pattern in the form of an `Architecture`, in which None stands for all layers."""
        pattern = tuple(holds)
        return None if all(pattern) else pattern

    @staticmethod
    def _layer_types(config: ConfigValues, num_layers: int, known: tuple[str, ...]) -> list[str] | None:
        """Return the type of attention of each layer; None if the file does not give the types."""
        kinds = config.values.get("layer_types", [])
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            fix = "use a checkpoint whose layers all attend " + ("to every token" if known == (FULL,) else "so")
            raise config.wrong("layer_types", f"only {' or '.join(known)}", fix)
        if kinds and len(kinds) != num_layers:
            raise config.wrong("layer_types", f"{num_layers} entries, one for each layer")
        return kinds or None

    def _windowed(self, config: ConfigValues, num_layers: int, every: int, first: int = 1) -> list[bool]:
        """Return which layers see a window: as the file lists them, or else layers n with (n + first) % every != 0."""
        kinds = self._layer_types(config, num_layers, (WINDOW, FULL))
        return [kind == WINDOW for kind in kinds] if kinds else [(n + first) % every != 0 for n in range(num_layers)]

    def is_mtp(self, name: str, num_layers: int) -> bool:
        """Return whether a tensor is for multi-token prediction, judged by the number or the name of its layer.

        Args:
            name: the tensor's name in the checkpoint.
            num_layers: L.
        """
        layer = _NUMBERED.match(name) if self.has_mtp else None
        return bool(layer and (layer["mtp"] or int(layer["number"]) >= num_layers))

    def mamba(self, config: ConfigValues) -> MambaLayers | None:
        """Return the Mamba layers; None if the class has no Mamba layers.

        Raises:
            CheckpointError: Megatron-Core has no layer with these settings.
        """
        return None

    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """Return the `Architecture` fields that describe the experts; empty for a dense model."""
        return {}

    def computes(self, arch: Architecture) -> bool:
        """Return whether dense models of the class compute the same function as an architecture without experts."""
        return (
            arch.gated is self.gated
            and arch.activation in ACTIVATIONS.values()
            and arch.norm_places == (self.pre_norm, self.post_norm)
            and arch.wide_qk_norm is self.wide_qk_norm
            and arch.qk_norm is ("query_norm" in self.names)
            and (self.has_window or not arch.sliding_window)
            and (self.has_multipliers or arch.attention_multiplier is None)
            and (self.has_partial_rotary or arch.rotary_percent == 1)
            and arch.output_gate is ("delta_in" in self.names)
            and (arch.softmax_type == LEARNABLE) is ("sinks" in self.names)
            and all(getattr(arch, name) is None or name in self.layer_patterns for name in _PATTERNS)
        )

    def unsupported(self, arch: Architecture) -> Iterator[str]:
        """Yield the features of a model that the class cannot hold.

        Args:
            arch: architecture of the model, without a Hugging Face class.
        """
        if arch.num_experts:
            yield "experts"

    def constants(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return the constant tensors that the class needs and Megatron lacks: name -> shape."""
        return {}


def multipliers(config: ConfigValues) -> dict[str, float]:
    """Return the `Architecture` fields for Granite's factors and for the divisor of its logits."""
    return {name: config.number(name) for name in _MULTIPLIERS}


def zero_filled(config: ConfigValues) -> list[str]:
    """Return the parts that a model lacks and its folder fills with zeros, under their names in `ZERO_FILLED`."""
    names = config.values.get(ZERO_FILLED, [])
    if not isinstance(names, list):
        raise config.wrong(ZERO_FILLED, "a list of names")
    return names


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeFamily(Family, ABC):
    """A Hugging Face class of MoE models, to which an upcycled model can be exported.

    Args:
        router_score: function that the class applies to the router's logits, as in `UpcycleSpec`.
        has_attention_bias: whether the class reads `attention_bias`, which adds biases to query, key, value and output
            together.
        no_parent_because: reason why a model of the class cannot get more experts; "" if the model can get more
            experts.
        only_among_others: whether the class exists only as the text model inside a class that also has other parts.
    """

    router_score: str = "softmax"
    has_attention_bias: bool = False
    no_parent_because: str = ""
    only_among_others: bool = False

    def unsupported(self, arch: Architecture) -> Iterator[str]:
        """Yield the features of an MoE model that the class cannot hold."""
        yield from (reason for reason, holds in self.limits(arch).items() if holds)

    def limits(self, arch: Architecture) -> dict[str, bool]:
        """Return the limits of the class: reason for refusing a model -> whether it applies to this model.

        Args:
            arch: architecture of the model, without a Hugging Face class.
        """
        place = "before and after" if arch.pre_norm and arch.post_norm else "after" if arch.post_norm else "before"
        width = "over all heads" if arch.wide_qk_norm else "by head"
        # Reason -> whether the class has this limit, and whether the limit applies to this model.
        own = {
            "norms of query and key": ("query_norm" not in self.names, arch.qk_norm),
            "no norms of query and key": (self.defaults.get("qk_norm"), not arch.qk_norm),
            "shared experts": ("shared_fc1" not in self.names, arch.shared_ffn_size > 0),
            "a sliding window": (not self.has_window, arch.window is not None),
            "attention sinks": ("sinks" not in self.names, arch.softmax_type == LEARNABLE),
        }
        return {
            "Mamba layers": arch.mamba is not None,
            "gated delta nets, and a gate of attention": arch.output_gate != ("delta_in" in self.names),
            "layers of Gemma 4": arch.keeps_network,
            "norms that are not around zero": arch.zero_centered_norm < bool(self.defaults.get("zero_centered_norm")),
            "a network without a gate": not arch.gated,
            "a bias of the attention's output": arch.attention_out_bias and not self.has_attention_bias,
            "biases of the feed-forward network": arch.ffn_bias,
            f"{arch.router_score} scores": arch.router_score != self.router_score,
            "quantile_balancing: biases of the router's logits": arch.quantile_bias,
            f"norms {place} attention and network": arch.norm_places != (self.pre_norm, self.post_norm),
            f"norms of query and key {width}": arch.qk_norm and arch.wide_qk_norm != self.wide_qk_norm,
            "layers without positions": arch.rope_pattern is not None and "rope_pattern" not in self.layer_patterns,
            "a window in some layers": arch.window_pattern is not None and "window_pattern" not in self.layer_patterns,
            "heads that are rotated in part": arch.rotary_percent != 1 and not self.has_partial_rotary,
        } | {reason: holds for reason, (lacks, holds) in own.items() if lacks}

    def folded(self, arch: Architecture) -> dict[str, Any]:
        """Return the settings of a model that the class lacks, with their values; `models/folding.py` uses them.

        Args:
            arch: architecture of the MoE model.
        """
        if type(self).unsupported is not MoeFamily.unsupported:  # the family may have the settings under other names
            return {}
        kept = {*self.defaults, *(_MULTIPLIERS if self.has_multipliers else ())}
        lacks = [name for name in WITHOUT_EFFECT if name not in kept]
        return {name: getattr(arch, name) for name in lacks if getattr(arch, name) != WITHOUT_EFFECT[name]}

    @staticmethod
    def in_moe_layers(shapes: Mapping[str, tuple[int, ...]], arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Fill in templates of names for every MoE layer, and return the names with their shapes."""
        layers = (layer for layer in range(arch.num_layers) if arch.is_moe_layer(layer))
        return {name.format(layer=layer): shape for layer in layers for name, shape in shapes.items()}

    @abstractmethod
    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        """Return the settings of `config.json` that only this class has, or that have another meaning in this class.

        Args:
            arch: architecture of the MoE model.
        """
