"""The planner's activations are those that Megatron's layers keep, term by term, in any layout and recomputation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.published import shape
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning import activations
from nemo_upcycle.planning.activations import ActivationTerm, check_activations, kept_by_layer
from nemo_upcycle.planning.hardware import known_recipe, known_shape
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.memory import GIB, LayerBytes, stage_memory, worst_memory
from nemo_upcycle.planning.table import activations_lines
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.spec import UpcycleSpec


LLAMA = known_recipe("llama3_8b_e8t2").arch
SMALL = known_shape("smollm2_135m")
#: Terms in which nothing is rounded and nothing stands for another kernel's bookkeeping.
EXACT = ("qkv input", "attention", "softmax statistics", "network input", "expert input", "expert fc2 input")


def _work(recompute: str = "none", seq_length: int = 8192) -> Workload:
    return Workload(seq_length=seq_length, global_batch=512, capacity_factor=4.0, recompute=recompute)


def _terms(arch: Architecture, text: str, gpus: int, work: Workload) -> dict[str, ActivationTerm]:
    return {term.term: term for term in check_activations(arch, parse_layout(text, gpus), work)}


@pytest.mark.parametrize(
    ("name", "text", "gpus"),
    [
        ("smollm2_135m_e8t2", "ep=2", 2),
        ("llama3_8b_e8t2", "tp=2,pp=4,vp=8,ep=8", 64),
        ("qwen3_8b_e8t2", "tp=2,cp=2,pp=4,ep=4,etp=2", 64),
    ],
)
def test_recipes_keep_what_megatrons_layers_keep(name: str, text: str, gpus: int) -> None:
    recipe = known_recipe(name)
    work = replace(_work(), seq_length=recipe.defaults["seq_length"])
    terms = _terms(recipe.arch, text, gpus, work)
    assert {term.term for term in terms.values() if term.explained} == {"rotary", "dispatch"}
    assert [terms[term].difference_gib for term in EXACT] == [0.0] * len(EXACT)
    # The planner leaves out one float32 of every row of a norm, and the weight of every token slot.
    total = sum(term.planner_gib for term in terms.values())
    assert sum(abs(term.difference_gib) for term in terms.values() if not term.explained) < 0.001 * total
    memory = worst_memory(recipe.arch, parse_layout(text, gpus), work)[1]
    assert total == pytest.approx((memory.activations + memory.routed) / GIB, abs=0.001)


@pytest.mark.parametrize(
    "recompute",
    ["none", "core_attn", "layernorm", "moe_act", "layernorm,moe_act", "moe", "layernorm,moe", "full"],
)
def test_recomputation_frees_what_megatrons_layers_free(recompute: str) -> None:
    terms = _terms(LLAMA, "tp=2,cp=2,ep=8,mbs=2", 32, _work(recompute))
    shown = [term for term in EXACT if term in terms and not terms[term].explained]
    assert [terms[term].difference_gib for term in shown] == [0.0] * len(shown)
    assert terms["attention norm"].difference_gib == pytest.approx(0.0, abs=0.001)
    # Only Transformer Engine's experts recompute their activation alone.
    assert ("moe_act" in recompute) is ("expert fc2 input" in terms and "expert fc2 input" not in shown)


@pytest.mark.parametrize(
    ("arch", "text", "gpus", "recompute"),
    [
        (known_recipe("llama3_8b_dense_ct").arch, "tp=2,pp=2", 8, "none"),
        (known_recipe("llama3_8b_dense_ct").arch, "tp=4,cp=2", 8, "mlp"),
        (shape("qwen3_30b_a3b"), "tp=2,ep=8", 16, "none"),
        (known_recipe("olmo2_7b_e8t2").arch, "tp=2,ep=8", 16, "none"),
        (known_recipe("olmo2_7b_dense_ct").arch, "tp=2,cp=2", 8, "none"),
        (replace(SMALL, activation="gelu_tanh"), "tp=1", 2, "none"),
        (replace(SMALL, activation="gelu_tanh").upcycled(UpcycleSpec()), "ep=2", 2, "none"),
        (replace(SMALL, activation="squared_relu", gated=False).upcycled(UpcycleSpec()), "ep=2", 2, "none"),
        (
            known_recipe("llama3_8b_dense_ct").arch.upcycled(
                UpcycleSpec(num_experts=16, top_k=4, granularity=2, shared_experts=1, moe_layers="every-2")
            ),
            "tp=2,ep=4",
            8,
            "mlp",
        ),
    ],
)
def test_other_models_keep_what_layers_keep(arch: Architecture, text: str, gpus: int, recompute: str) -> None:
    terms = _terms(arch, text, gpus, _work(recompute, 4096))
    largest = max(terms.values(), key=lambda term: term.planner_gib)
    assert largest.difference_gib == pytest.approx(0.0, abs=0.001 * largest.planner_gib)


def test_local_modules_keep_scores_and_copies_that_fused_kernels_do_not() -> None:
    arch, layout, work = known_recipe("smollm2_135m_e8t2").arch, parse_layout("ep=2", 2), _work("none", 512)
    fused, local = (kept_by_layer(arch, layout, work, True, stand_ins) for stand_ins in (True, False))
    assert fused["softmax statistics"] == 4 * 9 * 512
    assert local["attention"] - fused["attention"] > 2 * 9 * 512 * 512
    assert fused["attention norm"] == 512 * (2 * 576 + 4)
    assert local["attention norm"] == 512 * (2 * 4 * 576 + 4)


def test_a_formula_that_is_wrong_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = activations.layer_bytes

    def wrong(*args: object) -> LayerBytes:
        layer = right(*args)
        return replace(layer, kept=layer.kept | {"qkv input": 2 * layer.kept["qkv input"]})

    monkeypatch.setattr(activations, "layer_bytes", wrong)
    with pytest.raises(UpcycleError) as caught:
        check_activations(LLAMA, parse_layout("tp=2,ep=8", 16), _work())
    assert caught.value.subject == "activations: qkv input"


def test_fp8_is_compared_in_bf16() -> None:
    layout = parse_layout("ep=8", 8)
    in_fp8 = replace(_work(), precision="fp8-blockwise")
    assert check_activations(LLAMA, layout, in_fp8) == check_activations(LLAMA, layout, _work())
    assert stage_memory(LLAMA, layout, in_fp8, 0).routed < stage_memory(LLAMA, layout, _work(), 0).routed


def test_megatron_is_left_as_it_was() -> None:
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    places = (torch.cuda, random, moe_utils, MoEAlltoAllTokenDispatcher)
    before = [dict(vars(place)) for place in places]
    _terms(LLAMA, "tp=2,ep=8", 16, _work("layernorm"))
    assert [dict(vars(place)) for place in places] == before


def test_the_table_says_why_terms_differ() -> None:
    term = ActivationTerm("rotary", 0.0, 0.5, 0.5, 0.5, "no sines", True)
    lines = activations_lines([vars(replace(term, term="attention", planner_gib=1.0, why="")), vars(term)])
    assert lines[-3].split() == ["rotary", "0.000", "0.500", "+0.500"]
    assert lines[-2].split() == ["all", "of", "them", "1.000", "1.000", "+1.000"]
    assert lines[-1] == "rotary: no sines"
