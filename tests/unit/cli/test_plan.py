"""`nemo-upcycle plan`: its text, its JSON and its refusals. tests/unit/planning checks the numbers themselves."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli.main import main
from tests.tiers import every_value
from tests.unit.cli.conftest import Command, refused, write_config
from tests.unit.cli.test_plan_parents import LLAMA3


PAPER = "--recipe llama3_8b_e8t2 --gpus 512 --layout tp=2,pp=4,vp=8,cp=1,ep=8,etp=1"
MOE, DENSE = "--recipe llama3_8b_e8t2 --gpus 64", "--recipe llama3_8b_dense_ct --gpus 64"
DROPLESS = "--recipe llama3_8b_e8t2 --gpus 128 --capacity-factor 0 --layout pp=4,vp=8,ep=8"
QWEN, BRIDGE = "--recipe qwen3_8b_e8t2 --gpus 64 --backend bridge", "--gpus 64 --backend bridge"
SMALL = "--recipe smollm2_135m_e8t2 --gpus 2"
CURRENT, LOW = "--precision fp8-current", "--low-precision-params"


def _typed(typed: str, folder: Path) -> list[str]:
    """Return the words of a command; the model is Llama 3 8B unless the command names one."""
    words = shlex.split(typed)
    named = {"--model", "--recipe"} & {*words}
    return ["plan", *words, *([] if named else ["--model", write_config(folder)])]


def _row(command: Command, *words: str) -> Any:
    return command.values("plan", *words)["rows"][0]


def test_json_has_exactly_what_is_promised(command: Command) -> None:
    values = command.values("plan", *PAPER.split())
    assert set(values) == {"model", "rows", "warnings"}
    assert values["model"] == {
        "total_params": 47_491_321_856,
        "active_params": 13_668_454_400,
        "flops_per_token": {"full": 91_743_608_832.0, "causal": 85_301_157_888.0},
    }
    row = values["rows"][0]
    names = "layout memory_gib fits tokens_per_s_per_gpu tflops_per_gpu mfu bound_by hours peak_tflops cost"
    assert set(row) == {*names.split(), "checkpoint_gib", "command", "no_command"}
    assert (row["layout"]["dp"], row["cost"]) == (64, None)
    parts = row["memory_gib"]
    assert parts.pop("total") == pytest.approx(sum(parts.values()), abs=0.01)


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (f"{PAPER} --price-per-gpu-hour 2 --explain 1", "47.49B|13.67B|34.4B|two of the three|bubble = |assumed:"),
        (DROPLESS, "Speed with balanced routing, as benchmarks force it. Nat"),
        (f"{DROPLESS} --routing natural", "Speed with natural routing"),
        ("--gpus 64 --layout tp=4,pp=4", "gradients bf16, overlap tp, mcore-0.15"),
        ("--gpus 64 --global-batch 64 --seq-length 131072", "warning: sequences have 131,072 tokens|8,192 positions"),
    ],
)
def test_the_text_says_what_the_numbers_count_on(command: Command, tmp_path: Path, typed: str, said: str) -> None:
    text = command.text(*_typed(typed, tmp_path))
    assert [words for words in said.split("|") if words not in text] == []


@pytest.mark.parametrize(
    ("typed", "words", "absent"),
    [
        (
            f"{PAPER} --precision fp8-blockwise --capacity-factor 1 --pad-to-capacity --global-batch 1024",
            "nemo llm pretrain|num_nodes=64|fp8_recipe='blockwise'|capacity_factor=1.0|pad_to_capacity=True|"
            "trainer.strategy.virtual_pipeline_model_parallel_size=8|trainer.strategy.sequence_parallel=True|"
            "trainer.strategy.expert_tensor_parallel_size=1|data.global_batch_size=1024|trainer.max_steps=11921",
            "-",
        ),
        (PAPER, "llama3_8b_e8t2(num_nodes=64", "data."),
        (f"{PAPER} --grad-dtype bf16", "trainer.plugins.grad_reduce_in_fp32=False", "-"),
        (
            "--recipe smollm2_135m_e8t2 --gpus 20 --global-batch 20 --capacity-factor 2",
            "num_nodes=4, num_gpus_per_node=5|model.config.moe_expert_capacity_factor=2.0",
            "-",
        ),
        ("--recipe qwen3_600m_e8t2_sft --gpus 1", 'nemo llm finetune --factory "qwen3_600m_e8t2_sft(', "micro_batch"),
        (f"{DROPLESS} {CURRENT} {LOW}", "trainer.plugins.fp8_param_gather=True", "-"),
        (
            f"{DROPLESS} --dispatcher ncclep --imbalance 1.6 --backend bridge",
            "moe_flex_dispatcher_backend=ncclep|model.moe_expert_rank_capacity_factor=1.6",
            "-",
        ),
        (QWEN, "-m nemo_upcycle.bridge", "--mode"),
        (f"--recipe qwen3_8b_e8t2_sft {BRIDGE}", "h100_bf16_config --mode pretrain dataset.folder=", "-"),
        (f"{MOE} --backend bridge {CURRENT} {LOW}", "mixed_precision=bf16_with_fp8_current_scaling_mixed", "-"),
        (f"--model asset://smollm2-135m --experts 8 {BRIDGE}", "mixed_precision=bf16_mixed", "-"),
    ],
)
def test_the_command_of_a_row_holds_what_is_planned(command: Command, typed: str, words: str, absent: str) -> None:
    found = _row(command, *typed.split())["command"]
    assert [word for word in words.split("|") if word not in found] == []
    assert absent == "-" or absent not in found


@pytest.mark.parametrize(
    ("typed", "why"),
    [
        (f"{DROPLESS} --dispatcher hybridep", "NeMo 2.7 has no HybridEP (--backend bridge has it)"),
        (f"{MOE} --gpu gb200 --precision mxfp8", "NeMo trains in mxfp8, only in bf16, fp8-delayed, fp8-current, fp8"),
        (f"--recipe qwen3_8b_dense_ct {BRIDGE}", "No recipe for Bridge is qwen3_8b_dense_ct (--backend nemo has"),
        (f"{QWEN} --grad-dtype bf16", "sums gradients in bf16, only in fp32"),
        (f"{QWEN} --precision fp8-blockwise {LOW}", "trains in fp8-blockwise, parameters too, only in fp8-delayed"),
    ],
)
def test_what_no_recipe_has_gets_no_command(command: Command, typed: str, why: str) -> None:
    row = _row(command, *typed.split())
    assert row["command"] is None
    assert why in row["no_command"]
    assert f"{row['no_command']}, so there is no command." in command.text("plan", *typed.split())


@pytest.mark.parametrize(
    ("gpus", "recipe"),
    every_value(("1", "7", "96", "100", "5000"), ("llama3_8b_e8t2", "llama3_70b_e8t2", "smollm2_135m_e8t2")),
)
def test_what_is_advised_fits(gpus: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Follow the advice in the refusal or in the text, for any number of GPUs."""
    words = ["plan", "--recipe", recipe, "--gpus", gpus, "--rows", "1"]
    if main(words):
        given = capsys.readouterr()
        text = " ".join((given.err or given.out).split())
        advice = re.search(r"(?:Set|with) (--[a-z-]+)[ =](\d+)", text)
        assert advice, text
        assert main([*words, *advice.groups()]) == 0
    assert "nemo llm pretrain" in capsys.readouterr().out


def test_where_nothing_fits_there_is_no_command_but_advice(command: Command) -> None:
    moe = ("plan", *MOE.split()[:2], "--rows", "2", "--gpus")
    assert "No layout fits 8 GPUs" in command.text(*moe, "8", status=1)
    assert [row["command"] for row in command.values(*moe, "8", status=1)["rows"]] == [None, None]
    said = "This layout does not fit, and no other layout fits 8 GPUs. A layout fits with --gpus 16 "
    assert said in command.text(*moe, "8", "--layout", "tp=4", status=1)
    text = command.text(*moe, "64", "--layout", "tp=4", status=1)
    found = re.search(r"This layout does not fit. On 64 GPUs, this one fits: --layout (\S+)", text)
    assert found, text
    command.text(*moe, "64", "--layout", found[1])


@pytest.mark.parametrize("columns", [60, 120, 250])
def test_it_stays_within_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    layout = "--global-batch 544 --layout tp=2,pp=17,ep=4,embedding=1,loss=1"
    main(["plan", *f"--recipe llama3_8b_e8t2 --gpus 136 --price-per-gpu-hour 2.5 {layout}".split()])
    text, _, command = capsys.readouterr().out.partition("row 1:\n")
    heading, _, rest = text.partition("\n\n")  # the table follows; it is as wide as its cells need
    assert {"layout", "GiB", "cost"} < set(rest.partition("\n")[0].split())
    lines = [*heading.splitlines(), *rest.partition("\n\n")[2].splitlines(), *command.splitlines()]
    for line in lines:  # only a single long word may exceed the width
        assert len(line) <= columns or len(shlex.split(line.removesuffix("\\"))) == 1


@pytest.mark.parametrize(
    ("changes", "recipe"),
    [
        ({"rope_scaling": LLAMA3 | {"factor": 8.0}}, "llama31_8b_dense_ct"),
        ({"rope_scaling": LLAMA3 | {"factor": 32.0}}, None),
        ({"rope_theta": 283461213.0}, None),
        ({"hidden_act": "gelu_pytorch_tanh"}, None),
    ],
)
def test_gives_a_command_only_if_the_recipe_is_exact(
    changes: dict[str, Any], recipe: str | None, tmp_path: Path, command: Command
) -> None:
    found = _row(command, "--model", write_config(tmp_path, **changes), "--gpus", "64")["command"]
    assert found is None if recipe is None else f"{recipe}(" in found


@pytest.mark.parametrize("precision", ["fp8-delayed", "fp8-current", "fp8-blockwise"])
def test_a_recipe_gets_every_setting_of_nemos_precision(precision: str, command: Command) -> None:
    from nemo.collections.llm.recipes.precision import mixed_precision

    from nemo_upcycle.trainers.recipe_arguments import FP8_RECIPES

    options = ("--precision", precision, "--layout", "cp=2")
    words = shlex.split(_row(command, *DENSE.split(), *options)["command"])
    given = dict(word.removeprefix("trainer.plugins.").split("=") for word in words if "trainer.plugins." in word)
    kind = {"fp8-delayed": "delayed", "fp8-current": "tensorwise", "fp8-blockwise": "blockwise"}[precision]
    wanted = getattr(mixed_precision, FP8_RECIPES[kind])().__arguments__ | {"fp8_param_gather": False}
    names = {name for name in wanted if name.startswith(("fp8", "first_last", "num_layers_at"))} - {"fp8_margin"}
    assert given == {name: str(wanted[name]) for name in names}


def test_newer_software_is_faster(command: Command) -> None:
    dropless = (*PAPER.split(), "--capacity-factor", "0")
    older, newer = (_row(command, *dropless, *more) for more in ((), ("--backend", "bridge")))
    assert newer["tokens_per_s_per_gpu"] > older["tokens_per_s_per_gpu"]


def test_low_precision_parameters_are_as_the_run_has_them(tmp_path: Path, command: Command) -> None:
    """With mxfp8, a model without a recipe in this package keeps its parameters in FP8, as NVIDIA's recipes do."""
    options = ("--gpus", "64", "--gpu", "b200", "--precision", "mxfp8", "--layout", "tp=1")

    def memory(*more: str, **changes: Any) -> Any:
        return _row(command, "--model", write_config(tmp_path, **changes), *options, *more)["memory_gib"]

    plain, low = memory(), memory("--low-precision-params")
    assert low["weights"] < 0.2 * plain["weights"]
    assert memory(rope_theta=1e6) == low
    assert memory("--no-low-precision-params", rope_theta=1e6) == plain


def test_a_model_folder_dense_upcycled_or_moe(tmp_path: Path, command: Command) -> None:
    model = ("plan", "--model", write_config(tmp_path), "--gpus", "64")
    for more, count, recipe in (((), 8_030_261_248, "dense_ct"), (("--experts", "8"), 47_491_321_856, "e8t2")):
        found = command.values(*model, *more)
        assert found["model"]["total_params"] == count
        said = f"llama3_8b_{recipe}(dense='{tmp_path}', num_nodes=8, "
        assert said in found["rows"][0]["command"]
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
    write_config(tmp_path, vocab_size=32000, **mixtral)
    assert command.values(*model)["model"]["total_params"] == 46_702_792_704
    assert "No recipe of this package trains this model" in command.text(*model, "--rows", "1")
    more = command.values(*model, "--experts", "16")["model"]
    routers, networks = 8 * 4096, 8 * 3 * 4096 * 14336
    assert more["total_params"] == 46_702_792_704 + 32 * (routers + networks)
    error = refused(*model, "--experts", "16", "--granularity", "2")
    assert str(error).startswith("--granularity 2 cannot be used with a parent that has experts")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (f"{MOE} --experts 4", "--experts 4 cannot be combined with --recipe"),
        (f"{MOE} --overlap tp", "--overlap tp cannot be combined with --recipe"),
        (f"{MOE} --backend megatron", "--backend 'megatron' does not exist"),
        (f"{MOE} --gpu A100", "--gpu 'A100' does not exist"),
        (f"{MOE} --gpus 0", "--gpus is 0; expected"),
        (f"{MOE} --price-per-gpu-hour nan", "--price-per-gpu-hour is nan; expected"),
        (f"{MOE} --micro-batch 3", "--global-batch is 512; expected"),
        (f"{MOE} --seq-length {'8' * 400}", f"--seq-length is {'8' * 400}; expected"),
        (f"{MOE} --imbalance 0", "--imbalance is 0.0; expected"),
        (f"{MOE} --capacity-factor -1", "--capacity-factor is -1.0; expected"),
        (f"{MOE} --capacity-factor 0 --pad-to-capacity", "--capacity-factor is None; expected"),
        (f"{MOE} --low-precision-params", "--low-precision-params needs --precision in FP8 or FP4"),
        (f"{PAPER} --explain 2", "--explain is 2; expected"),
        (
            f"{PAPER} --precision fp8-delayed --recompute moe_act",
            "--recompute moe_act cannot be combined with fp8-delayed",
        ),
        (f"{PAPER} --recompute none,moe", "--recompute 'none' does not exist"),
        (f"{MOE} --layout ''", "--layout is empty"),
        (f"{MOE} --layout mbs=0", "--layout mbs is 0; expected"),
        (f"{MOE} --layout mbs=2 --micro-batch 1", "--micro-batch is 1, and the layout says mbs=2"),
        (f"{SMALL} --recompute moe_act", "--recompute moe_act cannot be used with this recipe"),
        (f"{SMALL} --dispatcher deepep", "--dispatcher deepep cannot be used with this recipe"),
        (f"{DENSE} --capacity-factor 2", "--capacity-factor 2.0 cannot be used with a dense model"),
        (f"{DENSE} --recompute moe_act", "--recompute moe_act cannot be used with a dense model"),
        ("--recipe llama3_8b_e8t --gpus 8", "--recipe 'llama3_8b_e8t' does not exist"),
        ("--gpus 8 --experts 8 --top-k 0", "--top-k is 0; expected"),  # zero is a value, not a missing option
        ("--gpus 8 --granularity 2", "--granularity 2 needs --experts"),
    ],
)
def test_mistakes_are_named_as_they_were_typed(tmp_path: Path, typed: str, said: str) -> None:
    assert str(refused(*_typed(typed, tmp_path))).startswith(said)


def test_a_parent_that_training_refuses_is_not_planned(tmp_path: Path) -> None:
    folder = write_config(tmp_path, rope_scaling={"rope_type": "dynamic", "factor": 4.0})
    assert refused("plan", "--model", folder, "--gpus", "64").got == "dynamic"
