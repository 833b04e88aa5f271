"""What a model family is to the package: one record a Hugging Face class, everything special about it inside."""

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
#: What `layer_types` calls layers whose attention sees a window, and those that see all.
WINDOW, FULL = "sliding_attention", "full_attention"
#: Base of the rotary embedding in layers with a window, where it is another: only classes that have a default read it.
LOCAL_BASE = "rope_local_base_freq"
#: Hugging Face's activations -> the architecture's.
ACTIVATIONS = {"silu": "silu", TANH_GELU: "gelu_tanh", "swish": "silu"}
#: The same of networks without a gate.
SQUARED_RELU = {"relu2": "squared_relu"}
#: Up to the number of the layer, of a tensor in one.
_NUMBERED = re.compile(r"model\.(?P<mtp>mtp_)?layers\.(?P<number>\d+)\.")
#: Fields of an `Architecture` that few classes have in some layers alone.
_PATTERNS = ("rope_pattern", "window_pattern")
#: Our own key of `config.json`: what the class always has and the model has not (`shared_expert`, `shared_gate`,
#: `qkv_bias`, `balancing_bias`), so that zeros stand for it.
ZERO_FILLED = "zero_filled"
#: Our own key of `config.json`: the `MoeFamily.folded_scale` of the model.
FOLDED_SCALE = "folded_routed_scaling_factor"
#: What transformers' configuration classes of the Llama family have in common. Without a default of its own, heads
#: share no keys, and the head dim is their part of the hidden size.
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
        values: settings by Llama's names, without nulls.
        where: how messages call the file.
        spelling: the file's own name of a setting -> Llama's, where they differ.
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

    def choice(self, key: str, choices: Mapping[str, str], fix: str) -> str:
        """Look up what a name stands for."""
        name = self.values.get(key)
        if not isinstance(name, str) or name not in choices:
            raise self.wrong(key, " or ".join(choices), fix)
        return choices[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One Hugging Face class: how its `config.json` is read and how its tensors are called.

    A family that is a Llama in all but names and defaults needs an instance; one that reads a setting in its own way
    overrides the method that reads it. Its tensors must be those of Llama, apart or fused: the rows of query, key and
    value, or of gate and up projection, one below the other.

    Args:
        title: how messages call it.
        hf_class: the class in `architectures`.
        model_type: the `model_type` beside it.
        names: role in the mapping table -> names of the tensors, one for each part of the role's `ParamMapping`, the
            same for parts that one tensor holds; `{layer}` and `{expert}` stand for numbers. A name that ends in
            `[{expert}]` is one of an expert in a tensor of all, in `[{expert}].T` of one that lies there transposed.
        defaults: what its `config.json` leaves unsaid, under Llama's names: the defaults of transformers'
            configuration class, and what the class fixes (`qkv_bias`, `zero_centered_norm`, `scaled_embedding`).
        spelling: its own name of a setting -> Llama's, where they differ.
        pre_norm: whether norms stand before attention and network (`attention_norm`, `ffn_norm`).
        post_norm: whether norms stand after them (`attention_post_norm`, `ffn_post_norm`).
        wide_qk_norm: whether query and key are normalised over all heads at once.
        gated: whether networks have a gate; without one, the last name of `fc1` counts.
        has_window: whether the class reads `sliding_window`.
        has_partial_rotary: whether it turns the part of a head that `partial_rotary_factor` says, and leaves the rest.
        has_multipliers: whether it multiplies embedding, scores, residual branches and logits as its settings say.
        layer_patterns: fields of an `Architecture` that say in which layers something holds, and that it may have.
        nemo_module: NeMo's module with the configuration of such models, or this package's where NeMo has none.
        hf_factors: role -> factor on the Megatron parameter in the Hugging Face tensor, where it is not 1; none where
            shared experts have a gate of their own.
        hf_offsets: role -> what the Hugging Face tensor has more than the Megatron parameter, where it is not 0.
        has_mtp: whether its checkpoints may hold layers of multi-token prediction, which are left out.
        constant_values: how the names of constants end that are not zero -> their number.
        own_settings: what its `config.json` says of itself alone, and another class would take for its own.
        saved_as: the class in `architectures`, where a dense family and one of experts have the same.
        computed_as: the class of transformers that computes it, where transformers has none of this name. Its newest
            releases know the `model_type`, and save such a model under that class.

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
        """Return the family of a configuration of this class: another where the class has a dense one and an MoE."""
        return self

    def activation(self, config: ConfigValues) -> str:
        """Return the activation function, as architectures call it.

        Raises:
            CheckpointError: the package does not know it.
        """
        if not self.gated:
            return config.choice("hidden_act", SQUARED_RELU, "use a checkpoint with squared ReLU")
        return config.choice("hidden_act", ACTIVATIONS, "use a SwiGLU or GEGLU checkpoint")

    def attention(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """Return the fields of an `Architecture` in which attention is not Llama's.

        Raises:
            CheckpointError: layers attend in a way that is not known.
        """
        self._layer_types(config, num_layers, (WINDOW if "sliding_window" in config.values else FULL,))
        return multipliers(config) if self.has_multipliers else {}

    @staticmethod
    def _pattern(holds: Iterable[bool]) -> tuple[bool, ...] | None:
        """Return in which layers something holds, as an `Architecture` has it: None for all."""
        pattern = tuple(holds)
        return None if all(pattern) else pattern

    @staticmethod
    def _layer_types(config: ConfigValues, num_layers: int, known: tuple[str, ...]) -> list[str] | None:
        """Return how each layer attends; None where the file does not say it."""
        kinds = config.values.get("layer_types", [])
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            fix = "use a checkpoint whose layers all attend " + ("to every token" if known == (FULL,) else "so")
            raise config.wrong("layer_types", f"{' or '.join(known)} alone", fix)
        if kinds and len(kinds) != num_layers:
            raise config.wrong("layer_types", f"{num_layers}, one a layer")
        return kinds or None

    def _windowed(self, config: ConfigValues, num_layers: int, every: int, first: int = 1) -> list[bool]:
        """Return which layers see a window: as the file says it, else all but each n-th, counted from `first`."""
        kinds = self._layer_types(config, num_layers, (WINDOW, FULL))
        return [kind == WINDOW for kind in kinds] if kinds else [(n + first) % every != 0 for n in range(num_layers)]

    def is_mtp(self, name: str, num_layers: int) -> bool:
        """Return whether a tensor belongs to multi-token prediction: behind the model's layers, or apart from them.

        Args:
            name: the tensor's name in the checkpoint.
            num_layers: L.
        """
        layer = _NUMBERED.match(name) if self.has_mtp else None
        return bool(layer and (layer["mtp"] or int(layer["number"]) >= num_layers))

    def mamba(self, config: ConfigValues) -> MambaLayers | None:
        """Return the Mamba layers and where they are; None for a class that has none.

        Raises:
            CheckpointError: no layer of Megatron-Core computes what the settings say.
        """
        return None

    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        """Return the fields of an `Architecture` that describe its experts; none for a dense model."""
        return {}

    def computes(self, arch: Architecture) -> bool:
        """Say whether dense models of the class compute what an architecture says, but for its experts."""
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
            and all(getattr(arch, name) is None or name in self.layer_patterns for name in _PATTERNS)
        )

    def unsupported(self, arch: Architecture) -> Iterator[str]:
        """Yield what the class cannot hold of a model.

        Args:
            arch: the model's architecture, without a Hugging Face class.
        """
        if arch.num_experts:
            yield "experts"

    def constants(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return name and shape of the tensors, of one number each, that the class wants and Megatron lacks."""
        return {}


def multipliers(config: ConfigValues) -> dict[str, float]:
    """Return the fields of an `Architecture` that a Granite multiplies by, or divides its logits by."""
    names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
    return {name: config.number(name) for name in names}


def zero_filled(config: ConfigValues) -> list[str]:
    """Return the parts of a model that are zeros and stand for nothing, as `ZERO_FILLED` names them."""
    names = config.values.get(ZERO_FILLED, [])
    if not isinstance(names, list):
        raise config.wrong(ZERO_FILLED, "a list of names")
    return names


@dataclass(frozen=True, kw_only=True, eq=False)
class MoeFamily(Family, ABC):
    """A Hugging Face class of MoE models: what an upcycled model can be exported as.

    Args:
        router_score: what the class sends the router's logits through, as in `UpcycleSpec`.
        has_attention_bias: whether it reads `attention_bias`: of query, key, value and the output, all or none.
        no_parent_because: why a model of the class gets no more experts; "" if it can.
        only_among_others: whether it is the text model of a class that has other parts, and of none without them.
    """

    router_score: str = "softmax"
    has_attention_bias: bool = False
    no_parent_because: str = ""
    only_among_others: bool = False

    def unsupported(self, arch: Architecture) -> Iterator[str]:
        """Yield what the class cannot hold of an MoE model."""
        yield from (reason for reason, holds in self.limits(arch).items() if holds)

    def limits(self, arch: Architecture) -> dict[str, bool]:
        """Return reasons why the class cannot hold some models, each with whether it holds of this one.

        Args:
            arch: the model's architecture, without a Hugging Face class.
        """
        place = "before and after" if arch.pre_norm and arch.post_norm else "after" if arch.post_norm else "before"
        width = "over all heads" if arch.wide_qk_norm else "by head"
        # Reason -> whether it is one of this class, and whether it holds.
        own = {
            "norms of query and key": ("query_norm" not in self.names, arch.qk_norm),
            "no norms of query and key": (self.defaults.get("qk_norm"), not arch.qk_norm),
            "shared experts": ("shared_fc1" not in self.names, arch.shared_ffn_size > 0),
            "a sliding window": (not self.has_window, arch.window is not None),
        }
        return {
            "Mamba layers": arch.mamba is not None,
            "gated delta nets, and a gate of attention": arch.output_gate != ("delta_in" in self.names),
            "layers of Gemma 4": arch.keeps_network,
            "a Gemma: norms around zero": arch.scaled_embedding
            or arch.zero_centered_norm != bool(self.defaults.get("zero_centered_norm")),
            "a network without a gate": not arch.gated,
            "a bias of the attention's output": arch.attention_out_bias and not self.has_attention_bias,
            "biases of the feed-forward network": arch.ffn_bias,
            f"{arch.router_score} scores": arch.router_score != self.router_score,
            "quantile_balancing: biases of the router's logits": arch.quantile_bias,
            f"norms {place} attention and network": arch.norm_places != (self.pre_norm, self.post_norm),
            f"norms of query and key {width}": arch.qk_norm and arch.wide_qk_norm != self.wide_qk_norm,
            "layers without positions": arch.rope_pattern is not None and "rope_pattern" not in self.layer_patterns,
            "a window in some layers": arch.window_pattern is not None and "window_pattern" not in self.layer_patterns,
            "multipliers of scores and embedding": arch.attention_multiplier is not None and not self.has_multipliers,
            "heads that are rotated in part": arch.rotary_percent != 1 and not self.has_partial_rotary,
        } | {reason: holds for reason, (lacks, holds) in own.items() if lacks}

    def folded_scale(self, arch: Architecture) -> float:
        """Return the factor on the experts' outputs that stands in their down projections.

        It is r = routed_scaling_factor where the class has no such setting, else 1. The routed output is linear in the
        down projections: r sum(p_e W_e h_e) = sum(p_e (r W_e) h_e). Shared experts and the router stay as they are. A
        power of two is exact in every type; any other r rounds each weight once, and `sources.checks.rounded_because`
        says so in 16 bits.

        Args:
            arch: the MoE model's architecture.
        """
        # a family that says by itself what it holds may have the setting under another name
        is_kept = "routed_scaling_factor" in self.defaults or type(self).unsupported is not MoeFamily.unsupported
        return 1.0 if is_kept else arch.routed_scaling_factor

    @staticmethod
    def in_moe_layers(shapes: Mapping[str, tuple[int, ...]], arch: Architecture) -> dict[str, tuple[int, ...]]:
        """Return templates of names and their shapes, filled in for every MoE layer."""
        layers = (layer for layer in range(arch.num_layers) if arch.is_moe_layer(layer))
        return {name.format(layer=layer): shape for layer in layers for name, shape in shapes.items()}

    def caveats(self, arch: Architecture) -> Iterator[str]:
        """Yield which servers are known not to serve such a model as it is, and why.

        Args:
            arch: the MoE model's architecture.
        """
        if arch.activation != "silu":
            yield "llama.cpp: its experts compute SiLU whatever config.json says, so its tokens differ"

    @abstractmethod
    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        """Return the settings of `config.json` that only this class has, or that mean something else in it.

        Args:
            arch: the MoE model's architecture.
        """
