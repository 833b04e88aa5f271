"""On each rank, planned parameters, buffers, optimizer states and activations are as large as in Megatron-Core.

Megatron's own modules, data-parallel wrapper and distributed-optimizer shards are built on the meta device under a
fake process group. This gives exact sizes for any cluster without its memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from benchmarks.published import shape
from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.planning.layout import Layout, parse_layout
from nemo_upcycle.planning.memory import worst_memory
from nemo_upcycle.planning.parameters import StageBuffers
from nemo_upcycle.planning.rules import check_layout
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.recipes import known_recipe
from nemo_upcycle.spec import UpcycleSpec
from tests.megatron_layers import NOT_LOCAL, kept_by_stage
from tests.megatron_ranks import allocated_bytes, build_rank, group_ranks
from tests.tiers import quick


# Odd sizes make padding necessary.
SIZES = {"num_layers": 8, "hidden_size": 72, "ffn_size": 168, "num_heads": 8, "num_kv_heads": 4, "head_dim": 10}
SIZES |= {"vocab_size": 1003}
SMALL = replace(known_shape("llama3_8b"), **SIZES)
TIED = replace(SMALL, tied_embeddings=True)
BIASED = replace(SMALL, hf_class="Qwen2ForCausalLM", qkv_bias=True)
NORMED = replace(known_shape("qwen3_600m"), **SIZES).upcycled(UpcycleSpec())
#: Norms at the same places as in OLMo 2.
OLMO2_NORMS = {"qk_norm": True, "wide_qk_norm": True, "pre_norm": False, "post_norm": True}
E8T2 = SMALL.upcycled(UpcycleSpec())
MIXED = BIASED.upcycled(UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1, moe_layers="every-2"))
TIED_MOE = TIED.upcycled(UpcycleSpec(num_experts=4))
#: Parents with experts: one has a gate for its shared expert, the other has biases that choose the experts.
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
    """Yield every rank of a small cluster, or the first, a middle and the last rank of each stage of a large one."""
    per_stage = layout.gpus // layout.pp
    if layout.gpus <= 8:
        yield from range(layout.gpus)
        return
    for stage in range(layout.pp):
        yield from sorted({stage * per_stage, stage * per_stage + per_stage // 2, (stage + 1) * per_stage - 1})


def _allocated(arch: Architecture, layout: Layout, gradients: str) -> tuple[int, int, int, int, int]:
    """Return Megatron's bytes of weights, gradients and optimizer, and the numbers of all and of expert parameters."""
    chunks = build_rank(arch, layout)
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    experts = sum(parameter.numel() for name, parameter in named if ".experts." in name)
    return *allocated_bytes(chunks, gradients), sum(parameter.numel() for _, parameter in named), experts


def _optimizer_bytes(plan: StageBuffers, layout: Layout, rank: int) -> int:
    ranks = group_ranks(layout, rank)
    return plan.optimizer_bytes(ranks.dp * layout.cp + ranks.cp, ranks.expert_dp)


STATES = [*((*case, "fp32") for case in CASES), *((*case, "bf16") for case in CASES[::8])]


@pytest.mark.parametrize(("arch", "text", "gpus", "gradients"), quick(STATES, *STATES[::2]))
def test_states_equal_megatrons(arch: Architecture, text: str, gpus: int, gradients: str) -> None:
    layout = parse_layout(text, gpus)
    check_layout(layout, arch, replace(WORK, global_batch=layout.dp * layout.pp))
    for rank in _ranks(layout):
        with megatron_rank(layout, rank) as ranks:
            got = _allocated(arch, layout, gradients)
        plan = StageBuffers(arch, layout, replace(WORK, gradients=gradients), group_ranks(layout, rank).pp)
        optimizer = _optimizer_bytes(plan, layout, rank)
        planned = (plan.weights_bytes, plan.gradients_bytes, optimizer, plan.params, plan.expert_params)
        assert got == planned, (rank, ranks)


#: Terms that must agree, because they contain no rounding and no bookkeeping of another kernel.
EXACT = {"qkv input", "attention", "softmax statistics", "network input", "expert input", "expert fc2 input"}
RECIPE = known_recipe("llama3_8b_e8t2").arch
DENSE = known_recipe("llama3_8b_dense_ct").arch
SMOLLM2 = known_shape("smollm2_135m")
FINE = UpcycleSpec(num_experts=16, top_k=4, granularity=2, shared_experts=1, moe_layers="every-2")


def _kept(arch: Architecture, text: str, gpus: int, recompute: str, seq_length: int) -> dict[str, tuple[float, float]]:
    """Compare the planned and the built terms of the fullest stage, and return both kinds of terms."""
    layout = parse_layout(text, gpus)
    work = Workload(seq_length=seq_length, global_batch=512, capacity_factor=4.0, recompute=recompute)
    stage, memory = worst_memory(arch, layout, work)
    terms = kept_by_stage(arch, layout, work, stage)
    total = sum(planned for planned, _ in terms.values())
    assert total == pytest.approx(memory.activations + memory.routed, abs=10)
    # With moe_act, only Transformer Engine's experts recompute the input of fc2.
    apart = NOT_LOCAL | ({"expert fc2 input"} if "moe_act" in recompute else set())
    for term in terms.keys() & EXACT - apart:
        assert terms[term][1] == pytest.approx(terms[term][0], rel=1e-5), term
    # The planner omits one float32 per row of a norm, and the weight of every token slot.
    assert sum(abs(planned - built) for term, (planned, built) in terms.items() if term not in apart) < 0.004 * total
    return terms


@pytest.mark.parametrize(
    ("arch", "text", "gpus", "recompute"),
    [
        (SMOLLM2.upcycled(UpcycleSpec()), "ep=2", 2, "none"),
        (RECIPE, "tp=2,pp=4,vp=8,ep=8", 64, "none"),
        (known_recipe("qwen3_8b_e8t2").arch, "tp=2,cp=2,pp=4,ep=4,etp=2", 64, "none"),
        (DENSE, "tp=2,pp=2", 8, "none"),
        (DENSE, "tp=4,cp=2", 8, "mlp"),
        (shape("qwen3_30b_a3b"), "tp=2,ep=8", 16, "none"),
        (known_recipe("olmo2_7b_e8t2").arch, "tp=2,ep=8", 16, "none"),
        (replace(SMOLLM2, activation="gelu_tanh").upcycled(UpcycleSpec()), "ep=2", 2, "none"),
        (replace(SMOLLM2, activation="squared_relu", gated=False).upcycled(UpcycleSpec()), "ep=2", 2, "none"),
        (DENSE.upcycled(FINE), "tp=2,ep=4", 8, "mlp"),
    ],
)
def test_layers_keep_what_is_planned(arch: Architecture, text: str, gpus: int, recompute: str) -> None:
    assert {"qkv input", "attention"} <= set(_kept(arch, text, gpus, recompute, 4096))


@pytest.mark.parametrize(
    "recompute", ["core_attn", "layernorm", "moe_act", "layernorm,moe_act", "moe", "layernorm,moe", "full"]
)
def test_recomputation_frees_what_is_planned(recompute: str) -> None:
    terms = _kept(RECIPE, "tp=2,cp=2,ep=8,mbs=2", 32, recompute, 8192)
    assert ("network input" in terms) is not (recompute == "full" or "layernorm" in recompute)
