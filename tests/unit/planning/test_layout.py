"""Which layouts are allowed, what is said of the others, and who holds what."""

from __future__ import annotations

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.hardware import known_recipe
from nemo_upcycle.planning.layout import Layout, parse_layout


LLAMA = known_recipe("llama3_8b_e8t2").made


@pytest.mark.parametrize(
    ("text", "gpus", "batch", "words"),
    [
        ("tp=3", 6, 512, ["tp: got 3", "key-value heads (8): 1, 2, 4, 8", "Fix: set tp=2"]),
        ("ep=6", 12, 512, ["ep: got 6", "num_experts (8)", "Fix: set ep=4"]),
        ("etp=5,ep=2", 10, 512, ["etp: got 5", "feed-forward size (14336)", "Fix: set etp=4"]),
        ("pp=5", 20, 512, ["pp: got 5", "num_layers (32)", "Fix: set pp=4"]),
        ("pp=4,vp=3", 8, 512, ["vp: got 3", "layers of a pipeline stage (8)", "Fix: set vp=2"]),
        ("vp=2", 8, 512, ["vp: got 2", "without pipeline stages"]),
        ("tp=2,pp=4", 12, 512, ["gpus: got 12", "tp x cp x pp (8)", "Fix: set gpus=16"]),
        ("pp=4,ep=8", 48, 512, ["gpus: got 48", "etp x ep x pp (32)", "Fix: set gpus=64"]),
        ("tp=1", 64, 100, ["global-batch: got 100", "dp x micro-batch (64 x 1)", "Fix: set global-batch=128"]),
        ("pp=4,vp=8,mbs=2", 128, 512, []),
        ("pp=8,vp=4", 64, 36, ["global-batch: got 36", "a multiple of dp x micro-batch"]),
        ("pp=8,vp=4", 64, 40, ["global-batch: got 40", "interleaved", "Fix: set global-batch=64"]),
        ("cp=3", 3, 3, ["seq-length: got 8192", "tp x 2 x cp (6)", "Fix: set seq-length=8190"]),
        ("pp=4,first=6,last=6", 4, 512, []),
        ("pp=4,first=6,last=5", 4, 512, ["pp: got 4", "21 layers"]),
        ("pp=2,first=6,loss=1", 4, 512, ["first and last", "loss=1"]),
        ("tp=2,etp=1", 8, 512, ["etp: got 1", "where ep is 1", "Fix: set etp=2"]),
        ("tp=0", 8, 512, ["tp: got 0", "1 or more"]),
        ("pp=4,first=0", 4, 512, ["first: got 0", "1 or more"]),
        ("pp=4,embedding=2", 4, 512, ["embedding: got 2", "0 or 1"]),
    ],
)
def test_rules(text: str, gpus: int, batch: int, words: list[str]) -> None:
    if not words:
        parse_layout(text, gpus).check(LLAMA, 8192, batch)
        return
    with pytest.raises(SpecError) as caught:
        parse_layout(text, gpus).check(LLAMA, 8192, batch)
    for word in words:
        assert word in str(caught.value)


def test_the_value_that_is_offered_is_a_good_one() -> None:
    for tp in range(1, 40):
        try:
            parse_layout(f"tp={tp}", tp * 16).check(LLAMA, tp * 64, tp * 16)
        except SpecError as error:
            offered = int(str(error).rpartition("set tp=")[2].rstrip("."))
            parse_layout(f"tp={offered}", offered * 16).check(LLAMA, 8192, 512)


def test_dense_models_have_no_experts_to_spread() -> None:
    with pytest.raises(SpecError, match="1 for a dense model"):
        parse_layout("ep=2", 8).check(known_recipe("llama3_8b_dense_ct").made, 8192, 512)


@pytest.mark.parametrize(
    ("text", "word"), [("tpp=2", "Did you mean 'tp'"), ("tp=two", "whole number"), ("tp=2,dp=3", "dp")]
)
def test_mistyped_layouts(text: str, word: str) -> None:
    with pytest.raises(SpecError, match=word):
        parse_layout(text, 8)


def test_groups_of_the_papers_layout() -> None:
    layout = parse_layout("tp=2,pp=4,vp=8,ep=8,etp=1", 512)
    assert (layout.dp, layout.expert_dp, layout.dense_shards) == (64, 16, 64)
    seats = [layout.seat(rank) for rank in range(512)]
    assert seats[0] == (0, 0, 0, 0, 0, 0, 0)
    assert seats[511] == (1, 0, 63, 3, 0, 7, 15)
    assert len({(seat.tp, seat.cp, seat.dp, seat.pp) for seat in seats}) == 512
    assert len({(seat.etp, seat.ep, seat.expert_dp, seat.pp) for seat in seats}) == 512
    with pytest.raises(SpecError, match="0 to 511"):
        layout.seat(512)


def test_interleaved_stages_take_turns() -> None:
    layout = Layout(gpus=4, pp=4, vp=4)
    chunks = layout.chunks(LLAMA, 1)
    assert [list(chunk.layers) for chunk in chunks] == [[2, 3], [10, 11], [18, 19], [26, 27]]
    assert not any(chunk.has_embedding or chunk.has_output for chunk in chunks)
    assert [chunk.has_embedding for chunk in layout.chunks(LLAMA, 0)] == [True, False, False, False]
    assert [chunk.has_output for chunk in layout.chunks(LLAMA, 3)] == [False, False, False, True]


@pytest.mark.parametrize("text", ["pp=4", "pp=8,vp=2", "pp=4,first=4,last=8,vp=2", "pp=2,embedding=1,loss=1"])
def test_every_layer_is_somewhere_once(text: str) -> None:
    layout = parse_layout(text, 8)
    layers = [layer for stage in range(layout.pp) for chunk in layout.chunks(LLAMA, stage) for layer in chunk.layers]
    assert sorted(layers) == list(range(32))
