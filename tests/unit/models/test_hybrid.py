"""Find the HybridModel layer that contains each part of a dense layer."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.hybrid import HybridLayers, LayerPart, hybrid_pattern
from nemo_upcycle.models.mapping import stored_hybrid


NAMES = [
    "embedding.word_embeddings.weight",
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
    "decoder.layers.1.mlp.linear_fc1.weight",
    "decoder.layers.2.self_attention.linear_proj.weight",
    "decoder.layers.3.mlp.experts.experts.linear_fc1.weight",
    "decoder.layers.3.pre_mlp_layernorm.weight",
    "decoder.final_norm.weight",
]


@pytest.mark.parametrize("pattern", ["*-*E", "*-|*E", "*|-*|E", "|*-*E"])
def test_borders_leave_the_map(pattern: str) -> None:
    layers = HybridLayers(pattern)
    assert layers.parts == (LayerPart(0, True), LayerPart(0, False), LayerPart(1, True), LayerPart(1, False))
    assert [layers.index(part) for part in layers.parts] == [0, 1, 2, 3]
    assert layers.moe_pattern == (False, True)


@pytest.mark.parametrize("pattern", ["", "|", "-*", "**--", "*-*", "MG-", "M-/M", "*-/*-", "G-", "*E+E"])
def test_layers_that_compute_otherwise_are_refused(pattern: str) -> None:
    with pytest.raises(SpecError, match=r"attention .* and network .* in turn"):
        HybridLayers(pattern)


@pytest.mark.parametrize(
    ("pattern", "stages", "fits"),
    [("*-*E", (4,), True), ("*|-|*|E", (2, 2), True), ("*-|*E", (1, 1), False), ("*-*E", (2, 2), False)],
)
def test_borders_must_be_the_pipelines(pattern: str, stages: tuple[int, ...], fits: bool) -> None:
    words = f"hybrid_layer_pattern .* segments; the pipeline has {math.prod(stages)} stages"
    with nullcontext() if fits else pytest.raises(SpecError, match=words):
        HybridLayers(pattern).require_stages(*stages)


@pytest.mark.parametrize(
    ("segments", "pattern"), [(1, "*E*-*E*-*E"), (2, "*E*-*E|*-*E"), (3, "*E*-|*E*-|*E"), (5, "*E|*-|*E|*-|*E")]
)
def test_a_pattern_is_made_of_the_layers_with_experts(segments: int, pattern: str) -> None:
    assert hybrid_pattern([True, False] * 2 + [True], segments) == pattern


def test_the_layers_of_a_checkpoint_are_read_from_its_names() -> None:
    assert stored_hybrid(NAMES) == stored_hybrid(NAMES[::-1]) == HybridLayers("*-*E")
    assert stored_hybrid([*NAMES[:-1], "decoder.final_layernorm.weight"]) is None  # these are names of a GPTModel
    with pytest.raises(SpecError, match=r"is \*\?\*E"):
        stored_hybrid([name for name in NAMES if ".layers.1." not in name])


@pytest.mark.parametrize("name", ["1.mixer.in_proj.weight.z", "1.mixer.A_log", "mlp.router.weight"])
def test_a_checkpoint_with_other_layers_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        stored_hybrid([*NAMES, f"decoder.layers.{name}"])
    assert caught.value.subject == f"Layer decoder.layers.{name}"
