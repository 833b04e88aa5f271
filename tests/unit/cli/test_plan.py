"""`nemo-upcycle plan`: what it prints, its JSON and its speed's precondition."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli import plan
from nemo_upcycle.cli.main import main
from tests.models import LLAMA3_8B
from tests.tiers import every_value
from tests.waiting import HANG_S


PAPER = ["--recipe", "llama3_8b_e8t2", "--gpus", "512", "--layout", "tp=2,pp=4,vp=8,cp=1,ep=8,etp=1"]


def _run(*options: str) -> int:
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return plan.run(parser.parse_args(options))


def _json(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    _run(*options, "--json")
    return json.loads(capsys.readouterr().out)


def _config(folder: Path, **changes: Any) -> Path:
    folder.joinpath("config.json").write_text(json.dumps(LLAMA3_8B | changes))
    return folder


def test_json_has_exactly_what_is_promised(capsys: pytest.CaptureFixture[str]) -> None:
    values = _json(capsys, *PAPER)
    assert set(values) == {"model", "rows", "warnings"}
    assert values["model"] == {
        "total_params": 47_491_321_856,
        "active_params": 13_668_454_400,
        "flops_per_token": {"full": 91_743_608_832.0, "causal": 85_301_157_888.0},
    }
    row = values["rows"][0]
    assert set(row) == {
        *("layout", "memory_gib", "fits", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "bound_by", "hours"),
        *("peak_tflops", "cost", "checkpoint_gib", "command", "no_command"),
    }
    assert row["layout"]["dp"] == 64
    assert row["memory_gib"]["total"] == pytest.approx(
        sum(value for name, value in row["memory_gib"].items() if name != "total"), abs=0.01
    )
    assert set(row["tflops_per_gpu"]) == {"full", "causal"}
    assert row["cost"] is None


def test_text_states_the_true_size_and_why_the_paper_differs(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(*PAPER, "--price-per-gpu-hour", "2", "--explain", "1") == 0
    out = " ".join(capsys.readouterr().out.split())
    for word in ("47.49B", "13.67B", "34.4B", "11.8B", "two of the three", "bubble = ", "assumed:"):
        assert word in out


_MOE, _TYPED = "--recipe llama3_8b_e8t2 --gpus 64", " ".join(PAPER)
_DROPLESS = "--recipe llama3_8b_e8t2 --gpus 128 --capacity-factor 0 --layout pp=4,vp=8,ep=8"
_QWEN, _BRIDGE = "--recipe qwen3_8b_e8t2 --gpus 64 --backend bridge", "--gpus 64 --backend bridge"
_CURRENT, _LOW = "--precision fp8-current", "--low-precision-params"


@pytest.mark.parametrize(
    ("typed", "words", "absent"),
    [
        (
            f"{_TYPED} --precision fp8-blockwise --capacity-factor 1 --pad-to-capacity --global-batch 1024",
            "nemo llm pretrain|num_nodes=64|fp8_recipe='blockwise'|capacity_factor=1.0|pad_to_capacity=True|"
            "trainer.strategy.tensor_model_parallel_size=2|trainer.strategy.virtual_pipeline_model_parallel_size=8|"
            "trainer.strategy.expert_tensor_parallel_size=1|trainer.strategy.sequence_parallel=True|"
            "data.global_batch_size=1024|trainer.max_steps=11921",
            "-",
        ),
        (_TYPED, "llama3_8b_e8t2(num_nodes=64", "data."),
        (_TYPED, "", "grad_reduce_in_fp32"),
        (f"{_TYPED} --grad-dtype bf16", "trainer.plugins.grad_reduce_in_fp32=False", "-"),
        (f"{_TYPED} --tokens 27B", "trainer.max_steps=6437", "-"),
        (f"{_TYPED} --tokens 27,000,000,000", "trainer.max_steps=6437", "-"),
        (
            "--recipe smollm2_135m_e8t2 --gpus 20 --global-batch 20 --capacity-factor 2",
            "num_nodes=4, num_gpus_per_node=5|model.config.moe_expert_capacity_factor=2.0",
            "-",
        ),
        (f"{_MOE} --gpu gb200", "num_nodes=16, num_gpus_per_node=4", "-"),
        (f"{_DROPLESS} {_CURRENT} {_LOW}", "trainer.plugins.fp8_param_gather=True", "-"),
        (f"{_DROPLESS} {_CURRENT}", "", "fp8_param_gather=True"),
        (f"--recipe llama3_8b_dense_ct --gpus 64 {_CURRENT} {_LOW}", "trainer.plugins.fp8_param_gather=True", "-"),
        (f"{_DROPLESS} --dense-router-gradient", "optim.dense_router_gradient=True", "-"),
        (
            f"{_DROPLESS} --dispatcher hybridep --backend bridge",
            "moe_flex_dispatcher_backend=hybridep",
            "rank_capacity_factor",
        ),
        (
            f"{_DROPLESS} --dispatcher ncclep --imbalance 1.6 --backend bridge",
            "moe_flex_dispatcher_backend=ncclep|model.moe_expert_rank_capacity_factor=1.6",
            "-",
        ),
        (_QWEN, "-m nemo_upcycle.bridge", "--mode"),
        (
            f"--recipe qwen3_8b_e8t2_sft {_BRIDGE}",
            "qwen3_8b_e8t2_sft_64gpu_h100_bf16_config --mode pretrain dataset.folder=",
            "-",
        ),
        (f"{_MOE} --backend bridge {_CURRENT} {_LOW}", "mixed_precision=bf16_with_fp8_current_scaling_mixed", "-"),
        (f"--model asset://smollm2-135m --experts 8 {_BRIDGE}", "mixed_precision=bf16_mixed", "-"),
    ],
)
def test_the_command_of_a_row_holds_what_is_planned(
    typed: str, words: str, absent: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _json(capsys, *typed.split())["rows"][0]["command"]
    assert [word for word in words.split("|") if word not in command] == []
    assert absent == "-" or absent not in command


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        (f"{_DROPLESS} --dispatcher hybridep", "NeMo 2.7 has no HybridEP (--backend bridge has it)"),
        (f"{_DROPLESS} --dispatcher ncclep", "NeMo 2.7 has no NCCL EP (--backend bridge has it)"),
        (f"{_MOE} --gpu gb200 --precision mxfp8", "NeMo trains in mxfp8, only in bf16, fp8-delayed, fp8-current, fp8"),
        (f"{_QWEN} --gpu gb200 --precision mxfp8", "for Bridge trains in mxfp8, only in bf16, fp8-blockwise"),
        (f"--recipe qwen3_8b_dense_ct {_BRIDGE}", "No recipe for Bridge is qwen3_8b_dense_ct (--backend nemo has"),
        (f"{_QWEN} {_CURRENT}", "trains in fp8-current, only in bf16, fp8-block"),
        (f"{_QWEN} --grad-dtype bf16", "sums gradients in bf16, only in fp32"),
        (
            f"{_QWEN} --precision fp8-blockwise {_LOW}",
            "trains in fp8-blockwise, parameters too, only in fp8-delayed, fp8-current, mxfp8, nvfp4",
        ),
    ],
)
def test_what_no_recipe_has_gets_no_command(typed: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = _json(capsys, *typed.split())["rows"][0]
    assert row["command"] is None
    assert why in row["no_command"]
    _run(*typed.split())
    assert f"{row['no_command']}, so there is no command." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        *((f"{stem}_e8t2", "512") for stem in ("llama31_8b", "llama3_70b", "qwen3_8b")),
        ("llama3_70b_dense_ct", "512"),
        ("smollm2_135m_e8t2", "1"),
        ("smollm2_135m_dense_ct", "1"),
    ],
)
def test_a_recipe_has_a_layout(name: str, gpus: str) -> None:
    assert _run("--recipe", name, "--gpus", gpus, "--rows", "2") == 0


def _refusal(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["plan", *options]) == 2
    return capsys.readouterr().err


def _advice(text: str) -> list[str]:
    """Return the option that a text advises, with its value."""
    found = re.search(r"(?:Fix: set|With) (--[a-z-]+)[ =](\d+)", text)
    assert found, text
    return [found[1], found[2]]


@pytest.mark.parametrize(
    ("gpus", "recipe"),
    every_value(("1", "7", "96", "100", "5000"), ("llama3_8b_e8t2", "llama3_70b_e8t2", "smollm2_135m_e8t2")),
)
def test_plan_advises_what_fits(gpus: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever number of GPUs is given, what is advised is done, and then something fits."""
    status = main(["plan", "--recipe", recipe, "--gpus", gpus, "--rows", "1"])
    if status:
        given = capsys.readouterr()
        advice = _advice(given.err or " ".join(given.out.split()))
        assert main(["plan", "--recipe", recipe, "--gpus", gpus, *advice, "--rows", "1"]) == 0
    assert "nemo llm pretrain" in capsys.readouterr().out


def test_plan_gives_no_command_for_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--recipe", "llama3_8b_e8t2", "--gpus", "8", "--rows", "2") == 1
    out = capsys.readouterr().out
    assert "Nothing fits 8 GPUs" in out
    assert "nemo llm" not in out
    rows = _json(capsys, "--recipe", "llama3_8b_e8t2", "--gpus", "8", "--rows", "2")["rows"]
    assert [row["command"] for row in rows] == [None, None]


def test_plan_says_what_fits_in_place_of_a_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--recipe", "llama3_8b_e8t2", "--gpus", "64", "--layout", "tp=4") == 1
    text = " ".join(capsys.readouterr().out.split())
    found = re.search(r"This layout does not fit. Of 64 GPUs this one does: --layout (\S+)", text)
    assert found, text
    assert "nemo llm" not in text
    assert _run("--recipe", "llama3_8b_e8t2", "--gpus", "64", "--layout", found[1]) == 0
    capsys.readouterr()
    assert _run("--recipe", "llama3_8b_e8t2", "--gpus", "8", "--layout", "tp=4") == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "This layout does not fit, nor does any other of 8 GPUs. With --gpus 16 " in text


@pytest.mark.parametrize(
    ("columns", "layout"),
    every_value(
        (60, 80, 120, 250),
        ("", "tp=2,pp=4,vp=8,cp=2,ep=8,etp=2,mbs=2", "tp=2,pp=17,ep=4,embedding=1,loss=1"),
    ),
)
def test_plan_stays_within_the_terminal(
    columns: int, layout: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    gpus = "136" if "17" in layout else "128"
    options = ["--recipe", "llama3_8b_e8t2", "--gpus", gpus, "--price-per-gpu-hour", "2.5"]
    options += ["--global-batch", "544"] if gpus == "136" else []
    _run(*options, *(["--layout", layout] if layout else []))
    text, _, command = capsys.readouterr().out.partition("row 1:\n")
    heading, _, rest = text.partition("\n\n")  # behind it the table, which is as wide as its cells
    lines = [*heading.splitlines(), *rest.partition("\n\n")[2].splitlines()]
    assert max(map(len, lines)) <= columns
    for line in command.splitlines():  # a single word may be longer
        assert len(line) <= columns or len(shlex.split(line.removesuffix("\\"))) == 1
    assert {"layout", "GiB", "cost"} < set(rest.partition("\n")[0].split())


LLAMA31 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("changes", "recipe"),
    [
        ({"rope_scaling": LLAMA31 | {"factor": 8.0}}, "llama31_8b_dense_ct"),
        ({"rope_scaling": LLAMA31 | {"factor": 32.0}}, None),
        ({"rope_theta": 283461213.0}, None),
        ({"rms_norm_eps": 1e-6}, None),
        ({"hidden_act": "gelu_pytorch_tanh"}, None),
    ],
)
def test_plan_gives_a_command_only_where_the_recipe_computes_the_parents_function(
    changes: dict[str, Any], recipe: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = _json(capsys, "--model", str(_config(tmp_path, **changes)), "--gpus", "64")["rows"][0]["command"]
    assert command is None if recipe is None else f"{recipe}(" in command


def test_plan_warns_of_sequences_longer_than_the_parent_has_positions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", str(_config(tmp_path)), "--gpus", "64", "--global-batch", "64", "--seq-length")
    (warning,) = _json(capsys, *options, "131072")["warnings"]
    assert "131,072 tokens" in warning
    assert "8,192 positions" in warning
    _run(*options, "131072")
    assert "warning: " in capsys.readouterr().out
    assert _json(capsys, *options, "8192")["warnings"] == []
    assert _json(capsys, "--recipe", "llama31_8b_e8t2", "--gpus", "512", "--seq-length", "32768")["warnings"] == []


@pytest.mark.parametrize("precision", ["fp8-delayed", "fp8-current", "fp8-blockwise"])
def test_a_recipe_without_the_argument_gets_every_setting_of_nemos_precision(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from nemo_upcycle.recipes.h100_arguments import FP8_RECIPES

    options = ("--recipe", "llama3_8b_dense_ct", "--gpus", "64", "--precision", precision, "--layout", "cp=2")
    words = shlex.split(_json(capsys, *options)["rows"][0]["command"])
    given = dict(word.removeprefix("trainer.plugins.").split("=") for word in words if "trainer.plugins." in word)
    kind = {"fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}[precision]
    wanted = FP8_RECIPES[kind]().__arguments__ | {"fp8_param_gather": False}
    names = {name for name in wanted if name.startswith(("fp8", "first_last", "num_layers_at"))} - {"fp8_margin"}
    assert given == {name: str(wanted[name]) for name in names}


def test_the_speed_says_which_routing_it_assumes(capsys: pytest.CaptureFixture[str]) -> None:
    speeds = []
    for routing, said in (
        ("balanced", "balanced routing, as benchmarks force it; nat"),
        ("natural", "natural routing"),
    ):
        options = (*_DROPLESS.split(), "--routing", routing)
        speeds.append(_json(capsys, *options)["rows"][0]["tokens_per_s_per_gpu"])
        _run(*options)
        assert f"Speed: with {said}" in " ".join(capsys.readouterr().out.split())
    assert speeds[0] > speeds[1]


def test_plan_has_the_cost_of_a_router_gradient_of_all_experts(capsys: pytest.CaptureFixture[str]) -> None:
    options = (*_DROPLESS.split()[:4], "--layout", "cp=2,ep=8")
    plain, dense = (_json(capsys, *options, *more)["rows"][0] for more in ((), ("--dense-router-gradient",)))
    assert 1.3 < dense["hours"] / plain["hours"] < 2.2
    _run(*options, "--dense-router-gradient", "--explain", "1")
    text = " ".join(capsys.readouterr().out.split())
    assert "router gradient of all experts: 6.765e+10 FLOPs of a token more, 74 %, none of MFU" in text


def test_plan_takes_nvidias_settings_for_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", str(_config(tmp_path)), "--gpus", "64", "--layout", "tp=4,pp=4")
    speeds = [
        _json(capsys, *model, *options)["rows"][0]["tokens_per_s_per_gpu"]
        for options in ((), ("--overlap", "tp"), ("--overlap", ""))
    ]
    assert speeds[0] == speeds[1] > speeds[2]
    _run(*model)
    assert "gradients bf16, overlap tp, mcore-0.15" in " ".join(capsys.readouterr().out.split())
    assert _json(capsys, *model)["rows"][0]["layout"]["overlap"] == ["tp"]


@pytest.mark.parametrize("name", ["mcore-0.17", "26.04.01"])
def test_plan_takes_software_by_its_generation_or_container(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = (*PAPER, "--capacity-factor", "0", "--software")
    now, later = (_json(capsys, *options, given)["rows"][0] for given in ("mcore-0.15", name))
    assert later["tokens_per_s_per_gpu"] > now["tokens_per_s_per_gpu"]


def test_low_precision_parameters_are_as_the_run_has_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model that no recipe of this package trains they are FP8, as NVIDIA's recipes keep them."""
    options = ("--gpus", "64", "--gpu", "b200", "--precision", "mxfp8", "--layout", "tp=1")

    def memory(*more: str, **changes: Any) -> dict[str, float]:
        folder = str(_config(tmp_path, **changes))
        return _json(capsys, "--model", folder, *options, *more)["rows"][0]["memory_gib"]

    plain, low = memory(), memory("--low-precision-params")
    assert low["weights"] < 0.2 * plain["weights"]
    assert low["fp8_copies"] == plain["fp8_copies"]
    assert memory(rope_theta=1e6) == low
    assert memory("--no-low-precision-params", rope_theta=1e6) == plain


def test_it_plans_without_what_takes_time_to_import() -> None:
    code = (
        "import sys\n"
        "from nemo_upcycle.cli.main import main\n"
        "assert main(['plan', '--recipe', 'llama3_8b_e8t2', '--gpus', '128', '--json']) == 0\n"
        "assert not {'torch', 'megatron', 'nemo', 'nemo_run', 'filelock'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S)
    assert done.returncode == 0, done.stderr
