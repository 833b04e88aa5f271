"""The search finds layouts that fit, ranks them, and says if nothing fits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.published import shape
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.search import MOST_GPUS, PlanRequest, evaluate_layout, nearest_gpus, search, usual_overlap
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.recipes import known_recipe
from nemo_upcycle.spec import UpcycleSpec
from tests.unit.models.test_nemotron_h import CONFIG


def _request(gpus: int, recipe: str = "llama3_8b_e8t2", gpu: str = "h100", batch: int = 512) -> PlanRequest:
    work = Workload(seq_length=8192, global_batch=batch, capacity_factor=1.0, pad=True)
    return PlanRequest(known_recipe(recipe).arch, known_gpu(gpu), gpus, work, 100e9)


def test_rows_fit_and_the_fastest_comes_first() -> None:
    plans = search(_request(128), 5)
    speeds = [plan.tokens_per_s_per_gpu for plan in plans]
    assert len({plan.layout for plan in plans}) == 5
    assert speeds == sorted(speeds, reverse=True)
    assert all(plan.verdict in ("fits", "tight") for plan in plans)


def test_evaluate_layout_agrees_with_search() -> None:
    request = _request(128)
    request = replace(request, work=replace(request.work, capacity_factor=4.0, pad=False))
    for plan in search(request, 20):
        assert evaluate_layout(request, plan.layout) == plan


def test_only_what_megatron_runs_is_searched() -> None:
    """Under delayed scaling, Megatron recomputes neither moe_act nor layernorm."""
    request = _request(64)
    request = replace(request, work=replace(request.work, precision="fp8-delayed", capacity_factor=4.0, pad=False))
    assert {plan.work.recompute for plan in search(request, 40)} <= {"none", "moe", "full"}


def test_hours_and_mfu_agree_with_the_speed() -> None:
    (plan,) = search(_request(128), 1)
    assert plan.hours == pytest.approx(100e9 / plan.tokens_per_s_per_gpu / 128 / 3600)
    assert plan.mfu == pytest.approx(plan.tokens_per_s_per_gpu * 9.1743608832e10 / 989e12)
    assert plan.tflops_per_gpu(causal=True) < plan.tflops_per_gpu(causal=False)
    assert plan.checkpoint_gib == pytest.approx(47_491_321_856 * 14 / 2**30)


@pytest.mark.parametrize("gpus", [3, 999_999])
def test_nearest_gpus_is_a_number_that_is_taken_and_fits(gpus: int) -> None:
    request = _request(gpus)
    number = nearest_gpus(request) or 0
    assert 0 < number <= MOST_GPUS
    assert search(replace(request, gpus=number), 1)[0].verdict != "no"


def test_a_batch_that_fits_no_layout_is_refused() -> None:
    with pytest.raises(SpecError, match=r"gpus is 7; .* share a batch of 1\. Set gpus=16"):
        search(_request(7, batch=1), 3)


def test_recomputation_is_weighed_and_not_the_least() -> None:
    """Recomputing the norms makes this layout fit. Recomputing the activation also makes it fit, but takes longer."""
    request = _request(512)
    request = replace(request, work=replace(request.work, capacity_factor=4.0, pad=False))
    layout = parse_layout("pp=2,vp=16,cp=2,ep=8", 512)
    chosen = evaluate_layout(request, layout)
    fitting = [plan for plan in request.plans(layout) if plan.verdict == "fits"]
    assert len(fitting) > 1
    assert chosen.time.total == min(plan.time.total for plan in fitting)
    assert chosen.work.recompute == "layernorm"


QWEN = shape("qwen3_235b_a22b")
DROPLESS = Workload(seq_length=4096, global_batch=1024)


@pytest.mark.parametrize(
    ("gpu", "text", "changes", "software", "recompute", "expected"),
    [
        ("h100", "tp=2,pp=8,vp=4,ep=32,embedding=1,loss=1", {}, "mcore-0.16", "none", ("ep",)),
        ("h100", "tp=2,pp=8,vp=4,ep=32,embedding=1,loss=1", {}, "mcore-0.16", "layernorm,moe", ()),
        ("h100", "tp=2,pp=8,ep=32,embedding=1,loss=1", {}, "mcore-0.16", "none", ()),  # no interleaved stages
        ("gb200", "ep=32", {"precision": "mxfp8"}, "mcore-0.17", "none", ()),
        ("gb200", "ep=32", {"precision": "mxfp8"}, "mcore-0.18", "none", ("ep", "launch")),
        ("b200", "ep=8", {"precision": "mxfp8"}, "mcore-0.18", "none", ()),  # 256 GPUs without NVLink racks
    ],
)
def test_experts_overlap_where_nvidias_recipes_do(
    gpu: str, text: str, changes: dict[str, str], software: str, recompute: str, expected: tuple[str, ...]
) -> None:
    work = replace(DROPLESS, **changes)
    assert usual_overlap(QWEN, known_gpu(gpu), parse_layout(text, 256), work, recompute, software) == expected


def test_experts_behind_mamba_layers_overlap_nothing() -> None:
    arch = architecture_from_config(CONFIG).upcycled(UpcycleSpec())
    work = replace(DROPLESS, precision="mxfp8")
    assert usual_overlap(arch, known_gpu("gb300"), parse_layout("ep=8", 8), work, "none", "mcore-0.18") == ()


def test_a_request_takes_nvidias_settings_for_each_layout() -> None:
    dense = _request(64, "llama3_70b_dense_ct", "gb200")
    dense = replace(dense, usual=("dispatcher", "overlap"))
    for tp, overlap in ((1, ()), (2, ("tp",))):
        assert evaluate_layout(dense, parse_layout(f"tp={tp},pp=4,vp=5", 64)).work.overlap == overlap
    moe = replace(_request(64, gpu="gb200"), usual=("dispatcher", "overlap"))
    moe = replace(moe, work=replace(moe.work, pad=False))
    assert evaluate_layout(moe, parse_layout("ep=8", 64)).work.dispatcher == "hybridep"
    assert evaluate_layout(replace(moe, usual=()), parse_layout("ep=8", 64)).work.dispatcher == "alltoall"


def test_blackwells_precisions_are_refused_elsewhere() -> None:
    request = _request(64)
    with pytest.raises(SpecError) as refused:
        replace(request, work=replace(request.work, precision="mxfp8"))
    assert refused.value.field == "precision"
