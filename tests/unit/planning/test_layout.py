"""Which rank holds which layers, and how layouts are written."""

from __future__ import annotations

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.layout import Layout, parse_layout
from nemo_upcycle.recipes import known_recipe


LLAMA = known_recipe("llama3_8b_e8t2").arch


@pytest.mark.parametrize(
    ("text", "word"), [("tpp=2", "Did you mean 'tp'"), ("tp=2,tp=4", "tp twice"), ("mbs=1234567890", "whole number")]
)
def test_mistyped_layouts(text: str, word: str) -> None:
    with pytest.raises(SpecError, match=word):
        parse_layout(text, 8)


def test_parse_layout_takes_blanks_and_commas_alike() -> None:
    layout = parse_layout(" tp = 2\tpp = 4,ep=8 etp=1, vp=8", 512)
    assert layout == parse_layout("tp=2,pp=4,vp=8,ep=8,etp=1", 512)
    assert (layout.dp, layout.expert_dp, layout.dense_shards) == (64, 16, 64)


def test_interleaved_stages_take_turns() -> None:
    layout = Layout(gpus=4, pp=4, vp=4)
    chunks = layout.chunks(LLAMA, 1)
    assert [list(chunk.layers) for chunk in chunks] == [[2, 3], [10, 11], [18, 19], [26, 27]]
    assert [chunk.has_embedding for chunk in layout.chunks(LLAMA, 0)] == [True, False, False, False]
    assert [chunk.has_output for chunk in layout.chunks(LLAMA, 3)] == [False, False, False, True]


@pytest.mark.parametrize(
    "text", ["pp=4", "pp=8,vp=2", "pp=4,first=4,last=8,vp=2", "pp=2,embedding=1,loss=1", "pp=3,vp=11,embedding=1"]
)
def test_every_layer_is_somewhere_once(text: str) -> None:
    layout = parse_layout(text, 8)
    layers = [layer for stage in range(layout.pp) for chunk in layout.chunks(LLAMA, stage) for layer in chunk.layers]
    assert sorted(layers) == list(range(32))


@pytest.mark.parametrize(
    ("text", "gpus", "node"), [("tp=2", 128, 8), ("tp=4", 36, 4), ("tp=4", 12, 4), ("pp=3", 9, 3)]
)
def test_tensor_parallelism_decides_how_large_a_node_is(text: str, gpus: int, node: int) -> None:
    assert parse_layout(text, gpus).node_gpus(8) == node
