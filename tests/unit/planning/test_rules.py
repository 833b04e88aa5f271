"""Which layouts are allowed; a refused layout is answered with the rule and a change that works."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.hardware import BRIDGE_SOFTWARE
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.rules import check_layout, first_violation
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.recipes import known_recipe


LLAMA = known_recipe("llama3_8b_e8t2").arch
DENSE = known_recipe("llama3_8b_dense_ct").arch
WORK = Workload(seq_length=8192, global_batch=512)


def _work(batch: int, **changes: object) -> Workload:
    return replace(WORK, global_batch=batch, **changes)


@pytest.mark.parametrize("text", ["pp=4,vp=8,mbs=2", "pp=4,first=6,last=6", "tp=2,pp=4,vp=8,ep=8,etp=1"])
def test_good_layouts(text: str) -> None:
    check_layout(parse_layout(text, 128), LLAMA, WORK)


def test_newer_software_shares_key_value_heads() -> None:
    check_layout(parse_layout("tp=16,ep=8", 16), LLAMA, WORK, BRIDGE_SOFTWARE)
    # 32 heads share 8 key-value heads.
    for tp, arch in ((24, LLAMA), (64, LLAMA), (16, replace(LLAMA, wide_qk_norm=True))):
        assert first_violation(parse_layout(f"tp={tp}", tp), arch, WORK, BRIDGE_SOFTWARE).name == "tp"


@pytest.mark.parametrize(
    ("text", "gpus", "batch", "words"),
    [
        ("tp=3", 6, 512, ["tp is 3", "key-value heads (8): 1, 2, 4, 8"]),
        (
            "tp=16",
            16,
            512,
            ["tp is 16", "key-value heads (8): 1, 2, 4, 8; multiples of it work only in Megatron-Bridge"],
        ),
        ("ep=6", 12, 512, ["ep is 6", "num_experts (8)"]),
        ("pp=5", 20, 512, ["pp is 5", "num_layers (32)", "Set pp=4"]),
        ("pp=4,vp=3", 8, 512, ["vp is 3", "layers of a pipeline stage (8)", "Set vp=2"]),
        ("vp=2", 8, 512, ["vp is 2", "without pipeline stages", "Set vp=1"]),
        ("tp=2,pp=4", 12, 512, ["tp x cp x pp is 8", "the GPUs (12)", "Set gpus=8"]),
        ("tp=1", 64, 100, ["global_batch is 100", "dp x micro-batch (64 x 1)", "Set global_batch=128"]),
        ("pp=8,vp=4", 64, 36, ["global_batch is 36", "a multiple of dp x micro-batch", "Set global_batch=64"]),
        ("cp=3", 3, 3, ["seq_length is 8192", "tp x 2 x cp (6)", "Set seq_length=8190"]),
        ("pp=4,first=6,last=5", 4, 512, ["pp is 4", "21 layers, and 2 more"]),
        ("pp=2,first=20,last=20", 64, 512, ["pp is 2", "divides -8 layers"]),
        ("pp=2,first=6,loss=1", 4, 512, ["first is 6", "loss=1", "Set loss=0"]),
        ("first=3", 8, 512, ["first is 3", "none without pipeline stages"]),
        ("tp=2,etp=1", 8, 512, ["etp is 1", "if ep is 1", "Set etp=2"]),
        ("tp=0", 8, 512, ["tp is 0", "1 or more", "Set tp=1"]),
        ("pp=4,embedding=2", 4, 512, ["embedding is 2", "0 or 1", "Set embedding=0"]),
    ],
)
def test_rules(text: str, gpus: int, batch: int, words: list[str]) -> None:
    layout, work = parse_layout(text, gpus), _work(batch)
    with pytest.raises(SpecError) as caught:
        check_layout(layout, LLAMA, work)
    for word in words:
        assert word in str(caught.value)
    _take(caught.value, layout, work)


def _take(error: SpecError, layout: object, work: Workload) -> None:
    """Follow an error's fix, and check that the layout is then valid, or at least passes the same rule."""
    found = re.fullmatch(r"set <(\w+)>=(\d+)|omit <(\w+)>", error.fix)
    assert found, error
    name, value = found[1] or found[3], int(found[2]) if found[2] else None
    if hasattr(work, name):
        work = replace(work, **{name: value})
    else:
        layout = replace(layout, **{name: value}, **({"etp": value} if name == "tp" and layout.ep == 1 else {}))
    rule = first_violation(layout, LLAMA, work)
    assert rule is None or rule.name not in error.field


def test_dense_models_have_no_experts_to_spread() -> None:
    with pytest.raises(SpecError, match=r"1 for a dense model\. Set ep=1"):
        check_layout(parse_layout("ep=2", 8), DENSE, WORK)
    with pytest.raises(SpecError, match=r"there are no experts\. Set etp=1"):
        check_layout(parse_layout("etp=3", 8), DENSE, WORK)


def test_deepep_needs_ranks_to_send_to() -> None:
    work = replace(WORK, dispatcher="deepep")
    assert first_violation(parse_layout("ep=8,pp=8", 64), LLAMA, work) is None
    with pytest.raises(SpecError, match=r"etp x ep above 1, as Megatron-Core's flex dispatcher needs\. Set ep=2"):
        check_layout(parse_layout("pp=32", 64), LLAMA, work)


def test_fp8_needs_tokens_in_multiples_of_sixteen() -> None:
    work = replace(WORK, seq_length=8184, precision="fp8-delayed")
    with pytest.raises(SpecError, match=r"a multiple of 16 tokens.*Set seq_length=8176"):
        check_layout(parse_layout("tp=2", 8), DENSE, work)
    assert first_violation(parse_layout("tp=2", 8), DENSE, replace(work, precision="bf16")) is None


@pytest.mark.parametrize(
    ("changes", "layout", "precision", "words"),
    [
        ({"hidden_size": 4104}, "tp=1", "fp8-current", r"multiples of 16 \(now 4104\).*Train in bf16"),
        ({"expert_ffn_size": 14336 // 512}, "ep=8", "fp8-blockwise", r"etp is 1.*\(now 28\)"),
        ({"expert_ffn_size": 48}, "ep=8", "mxfp8", r"multiples of 32 \(now 48\)"),
        ({"num_heads": 8, "head_dim": 8}, "tp=8,ep=8", "fp8-delayed", r"tp is 8.*\(now 8\)"),
    ],
)
def test_fp8_needs_matrices_of_its_kernels(changes: dict[str, int], layout: str, precision: str, words: str) -> None:
    arch, work, parsed = replace(LLAMA, **changes), replace(WORK, precision=precision), parse_layout(layout, 64)
    assert first_violation(parsed, arch, replace(work, precision="bf16")) is None
    with pytest.raises(SpecError, match=words):
        check_layout(parsed, arch, work)
