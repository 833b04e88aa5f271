"""`nemo-upcycle plan`: what it refuses, and in which words."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from tests.unit.cli.test_plan import PAPER, _config, _refusal, _run


def test_plan_refuses_a_parent_that_training_refuses(tmp_path: Path) -> None:
    folder = str(_config(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 4.0}))
    with pytest.raises(UpcycleError, match="rope_scaling: got dynamic, expected default or linear or llama3 or yarn"):
        _run("--model", folder, "--gpus", "64")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "0"], "error: --gpus: got 0"),
        (["--seq-length", "0"], "error: --seq-length: got 0, expected 1 to"),
        (["--capacity-factor", "-1"], "error: --capacity-factor: got -1.0"),
        (["--imbalance", "0"], "error: --imbalance: got 0.0"),
        (["--precision", "fp8"], "error: --precision 'fp8' does not exist."),
        (["--layout", "pp=4,cp=3"], "the GPUs (512). Fix: set --layout cp=2"),
        (["--layout", "tp=2", "--global-batch", "100"], "Fix: set --global-batch=256."),
        (["--layout", "tp=3"], "error: --layout tp: got 3, expected a divisor of the key-value heads (8): 1, 2, 4"),
        (["--layout", "vp=2"], "expected 1 without pipeline stages (--layout pp=1). Fix: set --layout vp=1."),
        (["--layout", "mbs=0"], "error: --layout mbs: got 0"),
        (["--layout", "tp=2", "--seq-length", "8191"], "error: --seq-length: got 8191"),
        (["--layout", ""], "error: --layout: got nothing, expected name=number"),
        (["--layout", "tp=2 pp4"], "error: layout key 'pp4' does not exist."),
        (["--layout", "tp=2 pp=four"], "error: --layout: got 'pp=four'"),
        (["--price-per-gpu-hour", "-3"], "error: --price-per-gpu-hour: got -3"),
        (["--top-k", "2"], "error: --top-k: got 2, expected none beside --recipe"),
        (["--recipe", "llama3_8b_e8t"], "Did you mean 'llama3_8b_e8t2'"),
        (["--gpu", "A100"], "Did you mean 'a100'? Valid: a100,"),
        (["--gpus", "12", "--layout", "ep=6"], "Fix: set --layout ep=4"),
        (["--gpus", "64", "--micro-batch", "3"], "Fix: set --global-batch="),
        (["--tokens", "27G"], "--tokens: got '27G', expected a number: 100B, 1.5T, 500M or 1e11"),
    ],
)
def test_plan_names_the_option_that_was_typed(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in _refusal(capsys, "--recipe", "llama3_8b_e8t2", "--gpus", "512", *options)


_MOE, _DENSE = "--recipe llama3_8b_e8t2", "--recipe llama3_8b_dense_ct --gpus 8"
_SMALL, _TYPED = "--recipe smollm2_135m_e8t2 --gpus 2", " ".join(PAPER)


@pytest.mark.parametrize(
    ("typed", "subject", "got", "expected"),
    [
        (f"{_MOE} --gpus 8 --gpu a100 --precision fp8-delayed", "precision", "fp8-delayed", "bf16 on A100"),
        (f"{_MOE} --gpus 8 --experts 4", "--experts", "4", "none beside --recipe"),
        (f"{_MOE} --gpus 64 --backend megatron", "backend", "megatron", "('bridge', 'nemo')"),
        ("--recipe '' --gpus 8", "recipe", "", "('llama31_8b"),
        ("--model no/such/folder --gpus 8", "model 'no/such/folder'", "no such folder", ""),
        (f"{_TYPED} --explain 2", "explain", "2", ""),
        (f"{_TYPED} --granularity 2", "--granularity", "2", "none beside --recipe"),
        (f"{_TYPED} --tokens inf", "--tokens", "'inf'", ""),
        (f"{_TYPED} --price-per-gpu-hour nan", "price_per_gpu_hour", "nan", ""),
        (f"{_TYPED} --rows 0", "rows", "0", ""),
        (f"{_TYPED} --micro-batch 0", "micro_batch", "0", "a whole number, 1 to 512"),
        (f"{_MOE} --gpus 512 --layout 'tp=2, mbs = 2' --micro-batch 1", "micro_batch", "1 beside mbs=2", ""),
        (f"{_TYPED} --overlap tp", "--overlap", "tp", "none beside --recipe"),
        (f"{_TYPED} --seq-length {'8' * 400}", "seq_length", "8" * 400, ""),
        (f"{_TYPED} --capacity-factor 5", "capacity_factor", "5", "at most num_experts / top_k (4)"),
        (f"{_TYPED} --pad-to-capacity", "capacity_factor", "4", "less than 4 with padding"),
        (f"{_TYPED} --capacity-factor 0 --pad-to-capacity", "capacity_factor", "None", ""),
        (f"{_TYPED} --precision fp8-delayed --recompute moe_act", "recompute", "moe_act with fp8-delayed", ""),
        (f"{_TYPED} --recompute none,moe", "recompute", "none", "('core_attn', 'layernorm', 'mlp', 'moe', 'm"),
        (f"{_TYPED} --low-precision-params", "--low-precision-params", "it", "--precision in FP8 or FP4"),
        (f"{_SMALL} --recompute moe_act", "--recompute", "moe_act", "none for this recipe"),
        (f"{_SMALL} --dispatcher deepep", "--dispatcher", "deepep", "none for this recipe"),
        (f"{_DENSE} --capacity-factor 2", "--capacity-factor", "2.0", "none for a dense model"),
        (f"{_DENSE} --recompute moe_act", "--recompute", "moe_act", "none for a dense model"),
        (f"{_DENSE} --dense-router-gradient", "--dense-router-gradient", "it", "none for a dense model"),
        ("--experts 8 --top-k 0", "top_k", "0", ""),  # a zero is a value
        ("--experts 8 --granularity 0", "granularity", "0", ""),
        ("--experts 0", "num_experts", "0", ""),
        ("--top-k 0", "--top-k", "0", "--experts beside it"),
        ("--granularity 2", "--granularity", "2", "--experts beside it"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, typed: str, subject: str, got: str, expected: str) -> None:
    named = () if "--recipe" in typed or "--model" in typed else ("--model", str(_config(tmp_path)), "--gpus", "64")
    with pytest.raises(UpcycleError) as caught:
        _run(*named, *shlex.split(typed))
    assert (caught.value.subject, str(caught.value.got)) == (subject, got)
    assert str(caught.value.expected).startswith(expected)
