"""Predictions against published measurements, and the sign of every influence."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import pytest

from benchmarks.published import published_rows, shape
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.flops import flops_per_token, mean_context
from nemo_upcycle.planning.hardware import Machine, gpu_of_device, known_gpu
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.throughput import StepTime, ThroughputModel
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.recipes import known_recipe


LLAMA = known_recipe("llama3_8b_e8t2").arch
H100 = known_gpu("h100")
MODEL = ThroughputModel(LLAMA, H100, Machine())
WORK = Workload(seq_length=8192, global_batch=512, capacity_factor=1.0, pad=True)


def _step(text: str, gpus: int = 128, **changes: object) -> StepTime:
    return MODEL.step(parse_layout(text, gpus), replace(WORK, **changes))


def _misses(kind: str, *, of_blackwell: bool) -> list[float]:
    rows = [row for row in published_rows() if row.gpu.is_blackwell is of_blackwell]
    chosen = [row for row in rows if (row.fitted if kind == "fitted" else row.is_unseen)]
    return [abs(row.predicted() / row.tokens_per_s_per_gpu - 1) for row in chosen]


@pytest.mark.parametrize("kind", ["fitted", "unseen"])
@pytest.mark.parametrize(("of_blackwell", "median"), [(False, 0.08), (True, 0.10)])
def test_published_rows_are_predicted(kind: str, of_blackwell: bool, median: float) -> None:
    """One unseen row is mispredicted: in NVIDIA's container 26.02, B300 is slower than B200 (results/planner.md)."""
    misses = sorted(_misses(kind, of_blackwell=of_blackwell))
    assert len(misses) >= 12
    assert statistics.median(misses) <= median
    missed = of_blackwell and kind == "unseen"
    assert misses[-1 - missed] <= 0.25


def test_the_bubble_is_what_the_schedule_says() -> None:
    step, twice = (_step("pp=4,vp=8,ep=8", global_batch=batch) for batch in (512, 1024))
    micro_batches = 512 // 32
    assert step.bubble == pytest.approx((twice.total - step.total) * 3 / (micro_batches * 8))
    assert _step("pp=4,vp=1,ep=8").bubble > 6 * step.bubble
    assert _step("ep=8").bubble == 0


#: A term, the layout and settings that raise the term, and the layout and settings to compare with.
_COST_MORE: list[tuple[str, str, dict[str, object], str, dict[str, object]]] = [
    ("nvlink", "tp=2,pp=4,vp=8,ep=8", {}, "pp=4,vp=8,ep=8", {}),
    ("nvlink", "pp=4,vp=8,ep=8,etp=2", {}, "pp=4,vp=8,ep=8", {}),
    ("network", "pp=4,ep=8,etp=4", {}, "pp=4,ep=8", {}),  # experts span several nodes
    ("gemm", "ep=8", {"capacity_factor": None, "pad": False}, "ep=8", {}),  # all ranks wait for the busiest one
    ("gemm", "ep=8", {}, "ep=8", {"capacity_factor": 0.5}),  # dropped tokens are not computed
    ("launch", "ep=4", {"capacity_factor": None, "pad": False}, "ep=4", {}),  # without padding, the host must wait
    ("launch", "ep=4", {}, "ep=8", {}),  # one launch per expert
    ("network", "ep=8", {}, "ep=8", {"gradients": "bf16"}),
    ("memory", "ep=8", {}, "ep=8", {"gradients": "bf16"}),
    ("total", "pp=4,vp=8,ep=8", {}, "pp=4,vp=8,ep=8", {"precision": "fp8-delayed"}),
    # With last=5, the last stage has five layers and the output layer, and every other stage has nine layers.
    ("total", "pp=4,ep=8", {}, "pp=4,ep=8,last=5", {}),
    ("total", "pp=4,ep=8,last=2", {}, "pp=4,ep=8", {}),
]


@pytest.mark.parametrize(("term", "dear", "dear_changes", "cheap", "cheap_changes"), _COST_MORE)
def test_what_costs_more_time(
    term: str, dear: str, dear_changes: dict[str, object], cheap: str, cheap_changes: dict[str, object]
) -> None:
    assert getattr(_step(dear, **dear_changes), term) > getattr(_step(cheap, **cheap_changes), term)


_QWEN = ThroughputModel(shape("qwen3_235b_a22b"), H100, Machine())
_DROPLESS = replace(WORK, seq_length=4096, capacity_factor=None, pad=False)


def _qwen(text: str, **changes: object) -> StepTime:
    return _QWEN.step(parse_layout(text, 256), replace(_DROPLESS, **changes))


def test_deepep_sends_a_token_once_to_each_node() -> None:
    """On average, the 8 of 128 experts that a token uses are on 3.6 of 4 nodes.

    Gradients are sent once per step, so the difference between two batch sizes does not contain gradients.
    """
    all_to_all, deepep = (
        _qwen("ep=32", dispatcher=name, global_batch=1024).network - _qwen("ep=32", dispatcher=name).network
        for name in ("alltoall", "deepep")
    )
    places = 4 * (1 - math.comb(96, 8) / math.comb(128, 8))
    assert deepep / all_to_all == pytest.approx(places / 8)
    assert _qwen("ep=32", dispatcher="hybridep") == _qwen("ep=32", dispatcher="deepep")
    one_each = replace(WORK, capacity_factor=None, pad=False), parse_layout("pp=4,ep=8", 128)
    assert MODEL.step(one_each[1], replace(one_each[0], dispatcher="deepep")) == MODEL.step(one_each[1], one_each[0])


def test_natural_routing_waits_longer_with_more_experts() -> None:
    costs = [
        model.step(layout, replace(_DROPLESS, routing="natural")).total / model.step(layout, _DROPLESS).total
        for model, layout in ((MODEL, parse_layout("ep=8", 256)), (_QWEN, parse_layout("ep=32", 256)))
    ]
    assert 1.02 < costs[0] < 1.1 < costs[1] < 1.5
    padded = replace(WORK, routing="natural")
    assert MODEL.step(parse_layout("ep=8", 128), padded) == MODEL.step(parse_layout("ep=8", 128), WORK)


def test_overlapped_traffic_of_experts_costs_what_computation_does_not_hide() -> None:
    plain, hidden = _qwen("tp=2,pp=2,ep=32"), _qwen("tp=2,pp=2,ep=32", overlap=("ep",))
    assert 0 < hidden.network < plain.network
    assert hidden.total >= plain.network, "no step is shorter than its traffic"
    plain, hidden = _qwen("ep=8"), _qwen("ep=8", overlap=("ep",))
    assert hidden.nvlink == pytest.approx((1 - Machine().ep_hidden) * plain.nvlink)
    captured = _qwen("ep=8", overlap=("launch",))
    assert captured.launch == 0 < plain.launch
    assert (captured.gemm, captured.memory) == (plain.gemm, plain.memory)


def test_overlapped_products_hide_a_part_of_tensor_parallelism() -> None:
    dense = ThroughputModel(known_recipe("llama3_8b_dense_ct").arch, known_gpu("h100"), Machine())
    layout = parse_layout("tp=4,pp=4", 128)
    plain, hidden = (dense.step(layout, replace(_DROPLESS, overlap=overlap)) for overlap in ((), ("tp",)))
    assert hidden.nvlink == pytest.approx((1 - Machine().tp_hidden) * plain.nvlink)


@pytest.mark.parametrize(
    "changes",
    [{"dispatcher": "deepp"}, {"routing": "nature"}, {"overlap": ("dp",)}, {"dispatcher": "deepep", "pad": True}],
)
def test_settings_that_training_refuses_are_not_planned(changes: dict[str, object]) -> None:
    with pytest.raises(SpecError, match=r"dispatcher|overlap|routing"):
        replace(WORK, **changes)


def test_recomputation_costs_time() -> None:
    kinds = ("none", "layernorm", "moe_act", "layernorm,moe_act", "core_attn", "moe", "full")
    times = [_step("pp=4,vp=8,ep=8", recompute=kind).total for kind in kinds]
    assert times == sorted(times)
    assert times[-1] / times[0] == pytest.approx(4 / 3, abs=0.05)


def test_a_window_hides_tokens_and_time() -> None:
    assert mean_context(4096) == mean_context(4096, 4096) == mean_context(4096, 9999) == 2048
    assert mean_context(4096, 128) == 126
    oss, layout = shape("gpt_oss_120b"), parse_layout("ep=64", 64)
    full, work = replace(oss, window_pattern=(False,) * 36), replace(_DROPLESS, seq_length=8192, global_batch=4096)
    times = [ThroughputModel(each, H100, Machine()).step(layout, work).attention for each in (oss, full)]
    assert times[0] / times[1] == pytest.approx((18 * 127 + 18 * 4096) / (36 * 4096), rel=1e-3)
    # Megatron-Bridge 26.08 on GB200: 934 TFLOP/s at 28,672 tokens/s.
    assert flops_per_token(oss, 4096, causal=True) == pytest.approx(934e12 / 28672, rel=0.01)


@pytest.mark.parametrize("name", ["NVIDIA GB200", "NVIDIA B200", "NVIDIA GeForce RTX 4090"])
def test_a_device_is_known_by_its_whole_name(name: str) -> None:
    gpu = gpu_of_device(name)
    assert gpu is not None
    assert gpu.name.split()[0] in name.split()
