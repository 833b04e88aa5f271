"""`nemo-upcycle plan`: what its speed assumes of the router, and for which settings NeMo and Bridge have a command."""

from __future__ import annotations

import pytest

from nemo_upcycle.cli.main import main
from nemo_upcycle.errors import UpcycleError
from tests.unit.cli.test_plan import _json, _run


def test_the_speed_says_which_routing_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "llama3_8b_e8t2", "--gpus", "128", "--capacity-factor", "0", "--layout", "pp=4,vp=8,ep=8")
    _run(*options)
    balanced = capsys.readouterr().out.replace("\n  ", " ")
    assert (
        "Speed: with balanced routing, as benchmarks force it; natural routing, as in training, takes about"
        in balanced
    )
    _run(*options, "--routing", "natural")
    assert "Speed: with natural routing, as in training." in capsys.readouterr().out
    rows = [_json(capsys, *options, *more)["rows"][0] for more in ((), ("--routing", "natural"))]
    assert rows[0]["tokens_per_s_per_gpu"] > rows[1]["tokens_per_s_per_gpu"]


@pytest.mark.parametrize(("dispatcher", "title"), [("hybridep", "HybridEP"), ("ncclep", "NCCL EP")])
def test_what_nemo_does_not_have_gets_no_command(
    capsys: pytest.CaptureFixture[str], dispatcher: str, title: str
) -> None:
    options = ("--recipe", "llama3_8b_e8t2", "--gpus", "128", "--capacity-factor", "0", "--layout", "pp=4,vp=8,ep=8")
    assert _json(capsys, *options)["rows"][0]["command"]
    options = (*options, "--dispatcher", dispatcher)
    row = _json(capsys, *options, "--software", "mcore-0.17")["rows"][0]
    assert row["command"] is None
    assert row["no_command"] == f"NeMo 2.7 has no {title} (--backend bridge has it)"
    command = _json(capsys, *options, "--backend", "bridge", "--imbalance", "1.6")["rows"][0]["command"]
    assert f"model.moe_flex_dispatcher_backend={dispatcher}" in command
    assert ("model.moe_expert_rank_capacity_factor=1.6" in command) == (dispatcher == "ncclep")


def test_bridges_command_is_for_the_recipes_that_bridge_has(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--gpus", "64", "--backend", "bridge"]
    assert main(["plan", "--recipe", "qwen3_8b_e8t2", *sizes]) == 0
    assert "-m nemo_upcycle.bridge" in capsys.readouterr().out
    assert main(["plan", "--recipe", "qwen3_8b_e8t2_sft", *sizes]) == 0
    command = capsys.readouterr().out.replace("\\\n", "")
    assert "qwen3_8b_e8t2_sft_64gpu_h100_bf16_config --mode pretrain dataset.folder=" in " ".join(command.split())
    assert main(["plan", "--recipe", "llama3_8b_e8t2", "--gpus", "64", "--backend", "megatron"]) == 2
    assert "bridge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--recipe", "qwen3_8b_dense_ct"], "No recipe for Bridge is qwen3_8b_dense_ct (--backend nemo has it)"),
        (
            ["--recipe", "qwen3_8b_e8t2", "--precision", "fp8-current"],
            "trains in fp8-current, only in bf16, fp8-block",
        ),
        (["--recipe", "qwen3_8b_e8t2", "--grad-dtype", "bf16"], "sums gradients in bf16, only in fp32"),
        (
            ["--recipe", "qwen3_8b_e8t2", "--precision", "fp8-blockwise", "--low-precision-params"],
            "trains in fp8-blockwise, parameters too, only in fp8-delayed, fp8-current, mxfp8, nvfp4",
        ),
    ],
)
def test_bridges_command_is_for_the_settings_that_its_recipes_have(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *options, "--gpus", "64", "--backend", "bridge"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert words in text
    assert "so there is no command." in text
    assert "nemo_upcycle.bridge" not in text


@pytest.mark.parametrize(("recipe", "layout"), [("llama3_8b_e8t2", "pp=4,vp=8,ep=8"), ("llama3_8b_dense_ct", "cp=2")])
def test_a_command_keeps_parameters_in_fp8_where_the_plan_does(
    recipe: str, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--gpus", "64", "--precision", "fp8-current", "--layout", layout, "--recipe", recipe)
    low = _json(capsys, *options, "--low-precision-params")["rows"][0]["command"]
    assert "trainer.plugins.fp8_param_gather=True" in low
    assert "fp8_param_gather=True" not in _json(capsys, *options)["rows"][0]["command"]


def test_bridges_precision_keeps_parameters_in_fp8_where_the_plan_does(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "llama3_8b_e8t2", "--gpus", "64", "--precision", "fp8-current", "--layout", "ep=8")
    row = _json(capsys, *options, "--low-precision-params", "--backend", "bridge")["rows"][0]
    assert "mixed_precision=bf16_with_fp8_current_scaling_mixed" in row["command"]


def test_bridges_command_of_a_model_has_the_gradients_that_are_planned(capsys: pytest.CaptureFixture[str]) -> None:
    row = _json(capsys, *("--model", "asset://smollm2-135m", "--experts", "8", "--gpus", "8", "--backend", "bridge"))[
        "rows"
    ][0]
    assert row["layout"]["gradients"] == "fp32"
    assert "mixed_precision=bf16_mixed" in row["command"]


def test_plan_has_the_cost_of_a_router_gradient_of_all_experts(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--recipe", "llama3_8b_e8t2", "--gpus", "128", "--layout", "cp=2,ep=8")
    plain, dense = (_json(capsys, *options, *more)["rows"][0] for more in ((), ("--dense-router-gradient",)))
    assert 1.3 < dense["hours"] / plain["hours"] < 2.2
    assert "optim.dense_router_gradient=True" in dense["command"]
    assert "dense_router_gradient" not in plain["command"]
    _run(*options, "--dense-router-gradient", "--explain", "1")
    text = " ".join(capsys.readouterr().out.split())
    assert "router gradient of all experts: 6.765e+10 FLOPs of a token more, 74 %, none of MFU" in text
    with pytest.raises(UpcycleError, match="none for a dense model"):
        _run("--recipe", "llama3_8b_dense_ct", "--gpus", "128", "--dense-router-gradient")
