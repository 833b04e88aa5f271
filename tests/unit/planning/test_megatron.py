"""The plan's parameters, buffers and optimizer states are those that Megatron-Core allocates, rank by rank.

Megatron's own modules, data-parallel wrapper and distributed optimizer's shards, on the meta device under a fake
process group: exact sizes of any cluster, without its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.growth import growth_spec
from nemo_upcycle.planning.check import allocated_bytes, build_rank, check_layout_against_megatron, megatron_rank
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.planning.layout import Layout, parse_layout
from nemo_upcycle.planning.parameters import StagePlan
from nemo_upcycle.planning.rules import check_layout
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.spec import UpcycleSpec


# Odd sizes, so that padding is not empty.
SIZES = {"num_layers": 8, "hidden_size": 72, "ffn_size": 168, "num_heads": 8, "num_kv_heads": 4, "head_dim": 10}
SIZES |= {"vocab_size": 1003}
SMALL = replace(known_shape("llama3_8b"), **SIZES)
TIED = replace(SMALL, tied_embeddings=True)
BIASED = replace(SMALL, hf_class="Qwen2ForCausalLM", qkv_bias=True)
NORMED = replace(known_shape("qwen3_600m"), **SIZES).upcycled(UpcycleSpec())
#: Norms where OLMo 2 has them.
OLMO2_NORMS = {"qk_norm": True, "wide_qk_norm": True, "pre_norm": False, "post_norm": True}
E8T2 = SMALL.upcycled(UpcycleSpec())
MIXED = BIASED.upcycled(UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1, moe_layers="every-2"))
TIED_MOE = TIED.upcycled(UpcycleSpec(num_experts=4))
#: Parents with experts: a gate of the shared ones; biases that choose them.
QWEN2_MOE = replace(MIXED, hf_class="Qwen2MoeForCausalLM", shared_gate=True, norm_topk=False)
GLM4_MOE = replace(
    NORMED,
    hf_class="Glm4MoeForCausalLM",
    shared_ffn_size=168,
    moe_pattern=(False, *[True] * 7),
    router_score="sigmoid",
    balancing_bias=True,
)
LLAMA = known_shape("llama3_8b").upcycled(UpcycleSpec())

CASES = [
    *((E8T2, text, gpus) for text, gpus in [
        ("tp=1", 1), ("tp=1", 3), ("tp=2", 4), ("tp=4,ep=2", 8), ("tp=4,etp=2,ep=4", 8), ("ep=8", 8),
        ("ep=2", 6), ("tp=2,etp=2,ep=2", 8),
        ("etp=2,ep=4", 8), ("tp=4", 8), ("pp=2", 4), ("pp=4,vp=2", 8), ("pp=8", 8), ("pp=2,vp=4,ep=4", 16),
        ("tp=2,pp=2,ep=4", 16), ("cp=2,ep=2", 4), ("tp=2,cp=2,pp=2,ep=8", 16), ("pp=4,first=1,last=1", 4),
        ("pp=3,first=2,last=4", 6), ("pp=2,vp=2,first=2", 4), ("pp=3,embedding=1", 6), ("pp=5,embedding=1,loss=1", 5),
        ("tp=2,pp=5,embedding=1,loss=1,ep=2,vp=2", 20),
    ]),
    *((MIXED, text, gpus) for text, gpus in [("tp=2,ep=2", 4), ("pp=4,vp=2,ep=4", 16), ("tp=4,etp=1,ep=8,pp=2", 16)]),
    *((SMALL, text, gpus) for text, gpus in [("tp=4", 8), ("pp=2,vp=2,cp=2", 8), ("tp=1", 7)]),
    *((TIED, text, gpus) for text, gpus in [("tp=1", 5), ("pp=2", 6), ("tp=2,pp=4,vp=2", 8)]),
    (TIED_MOE, "pp=2,ep=2", 12),
    (BIASED, "tp=2,pp=2", 4),
    (NORMED, "tp=2,pp=2,ep=4", 16),
    (replace(SMALL, **OLMO2_NORMS), "tp=2,pp=2", 4),
    (replace(SMALL, **OLMO2_NORMS).upcycled(UpcycleSpec()), "tp=2,pp=2,ep=4", 16),
    (QWEN2_MOE, "tp=2,ep=2", 4),
    (GLM4_MOE, "tp=2,pp=2,ep=4", 16),
    (LLAMA, "tp=2,pp=4,vp=8,ep=8", 64),
]  # fmt: skip
WORK = Workload(seq_length=512, global_batch=840)


def _ranks(layout: Layout) -> Iterator[int]:
    """Yield every rank of a small cluster; of a larger one the first, a middle and the last rank of every stage."""
    per_stage = layout.gpus // layout.pp
    if layout.gpus <= 8:
        yield from range(layout.gpus)
        return
    for stage in range(layout.pp):
        yield from sorted({stage * per_stage, stage * per_stage + per_stage // 2, (stage + 1) * per_stage - 1})


def _allocated(arch: Architecture, layout: Layout, gradients: str) -> tuple[int, int, int, int, int]:
    """Return Megatron's bytes of weights, gradients and optimizer, and its parameters and those of experts."""
    chunks = build_rank(arch, layout)
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    experts = sum(parameter.numel() for name, parameter in named if ".experts." in name)
    return *allocated_bytes(chunks, gradients), sum(parameter.numel() for _, parameter in named), experts


def _optimizer_bytes(plan: StagePlan, layout: Layout, rank: int) -> int:
    ranks = layout.group_ranks(rank)
    return plan.optimizer_bytes(ranks.dp * layout.cp + ranks.cp, ranks.expert_dp)


def test_there_are_enough_layouts() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize(
    ("arch", "text", "gpus", "gradients"),
    [*((*case, "fp32") for case in CASES), *((*case, "bf16") for case in CASES[::8])],
)
def test_states_equal_megatrons(arch: Architecture, text: str, gpus: int, gradients: str) -> None:
    layout = parse_layout(text, gpus)
    check_layout(layout, arch, replace(WORK, global_batch=layout.dp * layout.pp))
    for rank in _ranks(layout):
        with megatron_rank(layout, rank) as ranks:
            got = _allocated(arch, layout, gradients)
        plan = StagePlan(arch, layout, replace(WORK, gradients=gradients), layout.group_ranks(rank).pp)
        optimizer = _optimizer_bytes(plan, layout, rank)
        planned = (plan.weights_bytes, plan.gradients_bytes, optimizer, plan.params, plan.expert_params)
        assert got == planned, (rank, ranks)


def test_optimizer_shards_make_up_the_model() -> None:
    layout = parse_layout("tp=2,pp=2,ep=4", 16)
    plans = [StagePlan(E8T2, layout, WORK, layout.group_ranks(rank).pp) for rank in range(16)]
    owned = sum(_optimizer_bytes(plan, layout, rank) for rank, plan in enumerate(plans))
    padding = (layout.padded_vocab(E8T2) - E8T2.vocab_size) * E8T2.hidden_size * 2
    replicated = (17 * E8T2.hidden_size + 8 * 8 * E8T2.hidden_size) * (layout.tp - 1)  # norms and routers
    assert owned == 12 * (E8T2.total_params + padding + replicated)


@pytest.mark.parametrize("spec", [UpcycleSpec(), UpcycleSpec(num_experts=16, top_k=4, granularity=2)])
def test_check_compares_every_kind_of_rank(spec: UpcycleSpec) -> None:
    moe_arch = SMALL.upcycled(spec)
    layout = parse_layout("tp=2,pp=2,vp=2,ep=4", 32)
    result = check_layout_against_megatron(moe_arch, layout, WORK, SMALL, spec)
    assert (result.ranks, result.kinds) == (32, 8)
    assert result.tensors > 0


@pytest.mark.parametrize("parent", [QWEN2_MOE, GLM4_MOE], ids=["Qwen2-MoE", "Glm4-MoE"])
def test_check_compares_every_kind_of_rank_of_a_parent_with_experts(parent: Architecture) -> None:
    spec = growth_spec(parent, 16)
    layout = parse_layout("tp=2,pp=2,ep=4", 16)
    assert check_layout_against_megatron(parent.upcycled(spec), layout, WORK, parent, spec).tensors > 0


def test_check_finds_a_plan_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_upcycle.errors import UpcycleError
    from nemo_upcycle.planning import parameters

    right = parameters._layer_shapes
    monkeypatch.setattr(parameters, "_layer_shapes", lambda *args: right(*args)[:-1])
    with pytest.raises(UpcycleError, match=r"rank 0: parameters of chunk 0.*Megatron.*plan"):
        check_layout_against_megatron(E8T2, parse_layout("ep=2", 2), WORK)


def test_check_compares_the_gradients_that_the_run_has(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_upcycle.errors import UpcycleError
    from nemo_upcycle.planning import workload

    layout, in_bf16 = parse_layout("tp=2,ep=2", 4), replace(WORK, gradients="bf16")
    assert check_layout_against_megatron(E8T2, layout, in_bf16).ranks == 4
    monkeypatch.setitem(workload.GRADIENTS, "bf16", 4)
    with pytest.raises(UpcycleError, match=r"rank 0: bytes of weights, gradients, optimizer"):
        check_layout_against_megatron(E8T2, layout, in_bf16)
