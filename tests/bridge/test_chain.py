"""The chain of stages around trainings in Megatron-Bridge: import to report, stopped, changed, refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.sources.checkpoints import newest_checkpoint, steps_in
from nemo_upcycle.utils.files import is_complete, read_json
from tests.distributed.ranks import run_ranks
from tests.functional.started import STAGE, environment, start_training
from tests.functional.test_pipeline import run_in_own_process, run_killed_in_training
from tests.functional.tiny import write_finished_inputs
from tests.waiting import HANG_S


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
OWN = """
from pathlib import Path
from nemo_upcycle import UpcycleSpec
from tests.bridge.recipes import in_own_words

def linked(): return in_own_words(Path("{link}"), UpcycleSpec(num_experts=4, top_k=2))
"""
TINY, DENSE_CT = "tests.bridge.recipes:tiny", "tests.bridge.recipes:tiny_dense_ct"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a parent, its tokenised texts and a suite."""
    return write_finished_inputs(tmp_path_factory.mktemp("inputs"))


def _plan(inputs: Path, *settings: str, recipe: str = TINY) -> RunPlan:
    from nemo_upcycle.trainers.bridge.training import BridgeTraining

    moe = BridgeTraining(recipe, settings, nodes=1, ranks_per_node=2)
    dense_ct = BridgeTraining(DENSE_CT, settings, nodes=1, ranks_per_node=2)
    named = [str(inputs / name) for name in ("parent", "blend", "evaluation.yaml")]
    return RunPlan(recipe, *named, moe.to_text(), dense_ct.to_text(), trainer="bridge")


def _ranks(stage: str) -> int:
    return 2 if stage in ("pretrain", "dense_ct") else 1


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages; the training was killed after three steps, and run again."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    _plan(inputs).write(run_dir)
    run_killed_in_training(run_dir, 4, ranks=2)
    return run_dir


def _lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_killed_chain_completes(finished: Path) -> None:
    assert all(is_complete(finished / name) for name in ("hf", "upcycle/hf", "dense_ct/hf", "suite"))
    assert read_json(finished / "receipt.json")["within_tolerance"] is True
    assert read_json(finished / "pretrain/receipt.json")["ranks"] == 2
    assert "heldout_perplexity" in (finished / "report.md").read_text()


@pytest.mark.parametrize("stage", ["pretrain", "dense_ct"])
def test_every_step_has_a_line_and_every_validation(finished: Path, stage: str) -> None:
    lines = _lines(finished / stage / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    validated = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    assert [step for step, _ in validated] == [3, 6, 6]
    assert validated[1] == validated[2]  # Bridge validates again at the end: on the same sequences
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert all(("router" in line) == (stage == "pretrain") for line in lines if "loss" in line)


def test_the_report_says_what_was_trained(finished: Path) -> None:
    results = read_json(finished / "results.json")
    for stage in ("pretrain", "dense_ct"):
        settings = results["training"][stage]["settings"]
        assert (settings["ranks"], settings["global_batch_size"], settings["seq_length"]) == (2, 4, 64)
        assert settings["data"] == "blend tiny (blend)"
        assert results["training"][stage]["tokens"] == 6 * 4 * 64
    balance = [
        line["router"]["load_balancing_loss"]
        for line in _lines(finished / "pretrain/metrics.jsonl")
        if "router" in line
    ]
    assert all(value == pytest.approx(1, abs=0.2) for line in balance for value in line)
    assert "trained baseline" in (finished / "report.md").read_text()


def test_a_resumed_training_has_the_bits_of_one_that_was_not_stopped(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    from tests.bridge.test_upcycling import _same_bits

    run_dir = tmp_path / "run"
    _plan(inputs).write(run_dir)
    for name in ("import", "data", "upcycle", "pretrain", "dense_ct", "export"):
        answer = run_in_own_process(name, run_dir, ranks=_ranks(name))
        assert answer.status == 0, answer.text
    assert _same_bits(run_dir / "hf", finished / "hf")
    assert _same_bits(run_dir / "dense_ct/hf", finished / "dense_ct/hf")


def test_a_hybrid_model_goes_through_the_chain_as_a_gpt_model_does(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    from tests.bridge.test_upcycling import _same_bits

    run_dir = tmp_path / "run"
    _plan(inputs, recipe="tests.bridge.recipes:tiny_hybrid").write(run_dir)
    for name in ("import", "data", "upcycle", "pretrain"):
        answer = run_in_own_process(name, run_dir, ranks=_ranks(name))
        assert answer.status == 0, answer.text
    assert read_json(run_dir / "receipt.json")["within_tolerance"] is True
    own, other = (
        [line for line in _lines(run / "pretrain/metrics.jsonl") if "loss" in line] for run in (run_dir, finished)
    )
    assert [line["loss"] for line in own] == pytest.approx([line["loss"] for line in other], rel=1e-5)
    assert all(len(line["router"]["load_cv"]) == 4 for line in own)
    assert _same_bits(run_dir / "upcycle/hf", finished / "upcycle/hf")


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
        {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"overlap_moe_expert_parallel_comm": True, "delay_wgrad_compute": True},
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Ett|ttL"},
        {"context_parallel_size": 2},
    ],
    ids=str,
)
def test_step_0_is_checked_on_one_rank_whatever_the_layout(inputs: Path, settings: dict[str, object]) -> None:
    assert run_ranks(_build_for_step_0, 1, inputs / "parent", settings, process_group=False) == [4]


def _build_for_step_0(parent: Path, settings: dict[str, object]) -> int:
    from nemo_upcycle import UpcycleSpec, open_dense
    from nemo_upcycle.cpu.one_rank import one_rank
    from nemo_upcycle.trainers.bridge.models import upcycled_provider
    from nemo_upcycle.trainers.paged_models import paged_megatron

    spec = UpcycleSpec(num_experts=4, top_k=2)
    config = upcycled_provider(parent, spec, seq_length=64)
    for name, value in settings.items():
        setattr(config, name, value)
    with open_dense(parent) as dense, one_rank():
        paged, _ = paged_megatron(config, dense, spec)
        return len(paged.model.decoder.layers)


def test_a_training_that_is_told_to_stop_saves_and_goes_on(inputs: Path, tmp_path: Path) -> None:
    """As on a GPU: all processes of the job get the signal, those that load data, too."""
    run_dir = tmp_path / "run"
    settings = ["train.train_iters=350", "checkpoint.save_interval=1000", "model.expert_model_parallel_size=1"]
    settings.append("train.exit_signal_handler=true")
    plan = _plan(inputs, *settings, "validation.eval_iters=0", "dataset.num_workers=2")
    plan.write(run_dir)
    for name in ("import", "data", "upcycle"):
        assert run_in_own_process(name, run_dir).status == 0
    job = start_training(run_dir, until_step=3)
    os.killpg(job.pid, signal.SIGTERM)
    _, said = job.communicate(timeout=HANG_S)
    assert job.returncode == 75, said
    kept = newest_checkpoint(run_dir / "pretrain/checkpoints")
    assert kept is not None
    assert f"stage 'pretrain' stopped early: {steps_in(kept)} of 350 steps are kept" in said
    assert "Traceback" not in said

    again = start_training(run_dir, until_step=steps_in(kept) + 3)
    os.killpg(again.pid, signal.SIGKILL)
    again.communicate()
    steps = [line["step"] for line in _lines(run_dir / "pretrain/metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_fails_ends(inputs: Path, tmp_path: Path, workers: int) -> None:
    """Its loaders, too, which have been told that SIGTERM is not for them."""
    run_dir = tmp_path / "run"
    settings = ["train.exit_signal_handler=true"]
    settings += ["model.expert_model_parallel_size=1", f"dataset.num_workers={workers}", "validation.eval_iters=0"]
    settings += ["dataset.persistent_workers=false"] if not workers else []
    _plan(inputs, *settings, "checkpoint.save_interval=1").write(run_dir)
    for name in ("import", "data", "upcycle"):
        assert run_in_own_process(name, run_dir).status == 0
    (run_dir / "pretrain/checkpoints").mkdir(parents=True)
    (run_dir / "pretrain/checkpoints/iter_0000001").write_text("where the first checkpoint would be a folder")
    command = [*STAGE, "pretrain", run_dir]
    job = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=HANG_S, check=False)
    assert job.returncode == 1
    assert "FileExistsError" in job.stderr.rstrip().splitlines()[-1]


def test_a_started_training_takes_more_steps_and_no_other_learning_rate(
    finished: Path, inputs: Path, tmp_path: Path
) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    _plan(inputs, "optimizer.lr=1e-4").write(run_dir)
    answer = run_in_own_process("pretrain", run_dir)  # the first rank's, before the others would be waited for
    assert answer.status == 2
    assert "(pretrain.optimizer.lr was not set, is 1e-4)" in answer.text
    _plan(inputs, "train.train_iters=8", "checkpoint.save_interval=8").write(run_dir)
    answer = run_in_own_process("pretrain", run_dir, ranks=2)
    assert answer.status == 0, answer.text
    assert "pretrain steps was 0, is 8" in answer.text
    assert "pretrain.checkpoint.save_interval was not set, is 8" in answer.text
    steps = [line["step"] for line in _lines(run_dir / "pretrain/metrics.jsonl") if "loss" in line]
    assert steps == [*range(1, 9)]
    assert run_in_own_process("upcycle", run_dir).text.endswith("done before, from the same inputs\n")


def _command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    nemo = Path(sys.executable).with_name("nemo")
    command = [str(nemo), "upcycle", "pipeline", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(), check=False)


def test_the_command_runs_a_part_of_the_chain(inputs: Path, tmp_path: Path) -> None:
    """With a recipe of a user's own, which names the parent by a link, and no tokenizer."""
    (tmp_path / "link").symlink_to(inputs / "parent")
    (tmp_path / "own.py").write_text(OWN.format(link=tmp_path / "link"))
    words = [f"dense={inputs / 'parent'}", f"data={inputs / 'blend'}", f"evaluation={inputs / 'evaluation.yaml'}"]
    words += ["recipe=own:linked", "gpus=2", "pretrain.train.train_iters=2", "dir=run", "--until", "pretrain", "--yes"]
    done = _command(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train.train_iters: 2\n" in (tmp_path / "run/recipes/pretrain.yaml").read_text()
    assert [line["step"] for line in _lines(tmp_path / "run/pretrain/metrics.jsonl") if "loss" in line] == [1, 2]
    again = _command(*words, cwd=tmp_path)
    assert again.returncode == 0
    assert "[pretrain] done before" in again.stderr
