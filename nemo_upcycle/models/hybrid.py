"""Index map between the layers of Megatron's HybridModel and the layers of the dense model.

Megatron-Core's rule (`dist_checkpointing/gpt_checkpoint_interop.py` of 0.19.2): the i-th `*` of a pattern is the
attention of layer i, and the i-th `-` (dense) or `E` (experts) is its network. `|` marks a border between pipeline
stages. In a pattern with Mamba layers (`M`), each layer is a whole layer of the dense model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

from nemo_upcycle.errors import SpecError


_ATTENTION, _DENSE, _MOE, _MAMBA, _BORDER = "*-EM|"


class LayerPart(NamedTuple):
    """Content of a model's layer: a whole dense layer, or only the attention or the network of a dense layer.

    Args:
        layer: number of the dense layer, from 0.
        in_attention: True for the attention, False for the network, None for the whole layer.
    """

    layer: int
    in_attention: bool | None = None


@dataclass(frozen=True)
class HybridLayers:
    """The layers of a HybridModel.

    Args:
        pattern: Megatron's `hybrid_layer_pattern`, with borders or without.

    Raises:
        SpecError: the pattern has layers, or an order of layers, that no dense model has.

    Example:
        >>> HybridLayers("*-|*E").parts[2]
        LayerPart(layer=1, in_attention=True)
    """

    pattern: str

    def __post_init__(self) -> None:
        """Check the pattern."""
        if self.has_mamba:
            known = set(self.symbols) <= {_ATTENTION, _DENSE, _MOE, _MAMBA}
        else:
            known = bool(self.symbols) and self.symbols == hybrid_pattern(self.moe_pattern)
        if not known:
            raise SpecError(
                field="hybrid_layer_pattern",
                got=self.pattern,
                expected=(
                    "attention (*) and network (- or E) in turn, or the dense model's pattern with Mamba layers (M)"
                ),
                fix='write one like "*E*E" or "ME*E", with | between any two layers',
            )

    @property
    def symbols(self) -> str:
        """The pattern without borders, one character per layer."""
        return self.pattern.replace(_BORDER, "")

    @property
    def has_mamba(self) -> bool:
        """Whether there are Mamba layers, so that each layer is a whole layer of the dense model."""
        return _MAMBA in self.symbols

    @cached_property
    def attentions(self) -> tuple[int, ...]:
        """Index of the attention of each dense layer."""
        return tuple(index for index, symbol in enumerate(self.symbols) if symbol == _ATTENTION)

    @cached_property
    def networks(self) -> tuple[int, ...]:
        """Index of the network of each dense layer."""
        return tuple(index for index, symbol in enumerate(self.symbols) if symbol in (_DENSE, _MOE))

    @property
    def num_layers(self) -> int:
        """Number of the dense model's layers."""
        return len(self.moe_pattern)

    @property
    def moe_pattern(self) -> tuple[bool, ...]:
        """Which of the dense model's layers have experts."""
        layers = range(len(self.symbols)) if self.has_mamba else self.networks
        return tuple(self.symbols[index] == _MOE for index in layers)

    @cached_property
    def parts(self) -> tuple[LayerPart, ...]:
        """Content of each layer."""
        if self.has_mamba:
            return tuple(LayerPart(layer) for layer in range(self.num_layers))
        found = [(index, LayerPart(layer, True)) for layer, index in enumerate(self.attentions)]
        found += [(index, LayerPart(layer, False)) for layer, index in enumerate(self.networks)]
        return tuple(part for _, part in sorted(found))

    def require_stages(self, stages: int, virtual: int = 1) -> None:
        """Check that the borders fit the pipeline, because Megatron-Core omits layers beyond its last stage.

        Args:
            stages: number of pipeline stages.
            virtual: number of chunks per stage.

        Raises:
            SpecError: the borders do not fit, or there are no borders and Megatron-Core cannot cut the chunks by
                itself.
        """
        segments = self.pattern.count(_BORDER) + 1
        if segments != stages * virtual and (segments > 1 or virtual > 1):
            raise SpecError(
                field="hybrid_layer_pattern",
                kind="state",
                got=(
                    f"{self.pattern} has {segments} segments; the pipeline has {stages * virtual} stages, virtual "
                    "ones included"
                ),
                fix="set | between the layers of different stages, and nowhere else",
            )

    def index(self, part: LayerPart) -> int:
        """Return the index of the model's layer that contains a part. The first layer has index 0."""
        if self.has_mamba:
            return part.layer
        return (self.attentions if part.in_attention else self.networks)[part.layer]

    def with_experts(self, moe_pattern: Sequence[bool]) -> str:
        """Return the symbols of the layers, with experts only in the networks that a pattern selects."""
        symbols = list(self.symbols)
        for index, is_moe in zip(self.networks, moe_pattern, strict=True):
            symbols[index] = _MOE if is_moe else _DENSE
        return "".join(symbols)

    def require(self, expected: str, why: str) -> None:
        """Check that the model has the expected layers, dense and with experts.

        Args:
            expected: symbols of the layers.
            why: reason for these symbols, for the message.

        Raises:
            SpecError: the model has other layers.
        """
        if self.symbols != expected:
            raise SpecError(
                field="hybrid_layer_pattern",
                got=self.pattern,
                expected=f"{expected} ({why})",
                fix="set it to the expected pattern; the character | may be between any two layers",
            )


def hybrid_pattern(moe_pattern: Sequence[bool], segments: int = 1) -> str:
    """Return the pattern of a HybridModel that computes the same as a GPTModel: attention and network in turn.

    Args:
        moe_pattern: whether each layer has experts, as in `UpcycleSpec.moe_pattern`.
        segments: pipeline stages times virtual stages. If layers do not divide evenly, the first segments get more
            layers.

    Example:
        >>> hybrid_pattern([True, False, True], segments=2)
        '*E*-|*E'
    """
    layers = [_ATTENTION + (_MOE if is_moe else _DENSE) for is_moe in moe_pattern]
    size, more = divmod(len(layers), segments)
    ends = [size * number + min(number, more) for number in range(segments + 1)]
    return _BORDER.join("".join(layers[start:end]) for start, end in pairwise(ends))


def hybrid_of(model: Any) -> HybridLayers | None:
    """Return the layers of a HybridModel or of its configuration; None for a GPTModel.

    Raises:
        SpecError: see `HybridLayers`.
    """
    pattern = getattr(model, "hybrid_layer_pattern", None)
    return HybridLayers(pattern) if pattern else None


def layer_parts(model: Any) -> list[LayerPart]:
    """Return the content of each layer of a Megatron chunk: a dense layer, or one of its parts."""
    hybrid = hybrid_of(model)
    numbers = [layer.layer_number - 1 for layer in model.decoder.layers]
    return [hybrid.parts[number] if hybrid else LayerPart(number) for number in numbers]
