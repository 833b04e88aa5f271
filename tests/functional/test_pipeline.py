"""The chain of stages, each in its own process, on a tiny real model: killed, run again, changed, failed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.files import MARKER, is_complete, read_json
from tests.distributed.ranks import run_ranks
from tests.functional.tiny import EVALUATION, shrink, write_inputs


pytestmark = pytest.mark.slow
STAGES = ("import", "data", "upcycle", "pretrain", "dense_ct", "export", "evaluate", "report")


class Answer(NamedTuple):
    """How a stage's process ended, and what it wrote to the console."""

    status: int
    text: str


def _kill_when(path: Path, lines: int) -> None:
    """End this process as `kill -9` does, once `path` is there and, if a file, has so many lines."""
    while True:
        with contextlib.suppress(OSError):
            if path.exists() and (not lines or path.read_text().count("\n") >= lines):
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)


def _stage(name: str, run_dir: str, kill_at: tuple[str, int] | None) -> Answer:
    sys.stderr = io.StringIO()  # where messages and progress go
    from nemo_upcycle.pipeline.runner import run_stage

    if kill_at:
        threading.Thread(target=_kill_when, args=(Path(run_dir) / kill_at[0], kill_at[1]), daemon=True).start()
    status = 0
    try:
        run_stage(name, run_dir)
    except SystemExit as exit_:
        status = int(exit_.code or 0)
    return Answer(status, sys.stderr.getvalue())


def run_in_own_process(name: str, run_dir: Path, ranks: int = 1, kill_at: tuple[str, int] | None = None) -> Answer:
    """Run a stage as NeMo-Run's task does; return the first rank's answer."""
    return run_ranks(_stage, ranks, name, str(run_dir), kill_at, process_group=False)[0]


def run_killed_in_training(run_dir: Path, lines: int, ranks: int = 1) -> None:
    """Run all stages; the training is killed once its metrics have so many lines, and run again.

    Args:
        run_dir: of a chain whose plan is written.
        lines: of `metrics.jsonl`.
        ranks: of the two trainings.
    """
    for name in STAGES:
        count = ranks if name in ("pretrain", "dense_ct") else 1
        if name == "pretrain":
            with pytest.raises(RuntimeError, match="died"):
                run_in_own_process(name, run_dir, ranks=count, kill_at=("pretrain/metrics.jsonl", lines))
        answer = run_in_own_process(name, run_dir, ranks=count)
        assert answer.status == 0, answer.text


def write_plan(folder: Path) -> RunPlan:
    """Write the inputs of a tiny run; return its plan."""
    from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_e8t2
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe

    write_inputs(folder)
    texts = {
        name: dump_recipe(shrink(module.pretrain_recipe(), max_steps=6, checkpoint_every=2))
        for name, module in (("pretrain", smollm2_135m_e8t2), ("dense_ct", smollm2_135m_dense_ct))
    }
    inputs = [str(folder / name) for name in ("parent", "texts/blend.yaml", "evaluation.yaml")]
    return RunPlan("smollm2_135m_e8t2", *inputs, **texts)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunPlan:
    return write_plan(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages; upcycle and pretrain were killed in the middle and run again."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    plan.write(run_dir)
    for name in STAGES:
        kill_at = {"upcycle": ("upcycle/.hf.partial", 0), "pretrain": ("pretrain/metrics.jsonl", 3)}.get(name)
        if kill_at:
            with pytest.raises(RuntimeError, match="rank 0 died"):
                run_in_own_process(name, run_dir, kill_at=kill_at)
            assert not (run_dir / name / MARKER).exists()
        answer = run_in_own_process(name, run_dir)
        assert answer.status == 0, answer.text
        assert f"[{name}] done in" in answer.text
    return run_dir


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The finished run, to be changed by the test."""
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_killed_chain_completes(finished: Path) -> None:
    assert all((finished / name / MARKER).is_file() for name in STAGES)
    assert list(finished.rglob("*.partial")) == []
    assert all(is_complete(finished / name) for name in ("hf", "upcycle/hf", "dense_ct/hf", "data/blend", "suite"))
    steps = [line for line in (finished / "pretrain/metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == 6
    report = (finished / "report.md").read_text()
    assert "heldout_perplexity" in report


def test_the_report_says_what_was_trained_and_what_the_models_write(finished: Path) -> None:
    results = read_json(finished / "results.json")
    for stage in ("pretrain", "dense_ct"):
        done = results["training"][stage]
        settings = done["settings"]
        assert (settings["global_batch_size"], settings["seq_length"], settings["max_steps"]) == (4, 64, 6)
        assert done["highest_lr"] == pytest.approx(settings["max_lr"])
        assert done["tokens"] == 6 * 4 * 64
        assert done["tflops_per_gpu"]["full"] > done["tflops_per_gpu"]["causal"] > 0
        assert done["memory_gib"] > 0.1
    assert len(results["samples"]) == 2
    for sample in results["samples"]:
        assert list(sample["continuations"]) == ["dense", "trained", "dense_ct"]
        assert all(sample["continuations"].values())
    report = (finished / "report.md").read_text()
    assert "| learning rate, peak | 0.001, CosineAnnealing to 1e-05 over 6 steps, 2 of them warm-up |" in report
    assert "6 steps show that the chain works" in report
    assert report.count("| the text itself |") == 2


def test_step_0_equals_the_parent_and_training_improves_it(finished: Path) -> None:
    receipt = read_json(finished / "receipt.json")
    assert receipt["within_tolerance"] is True
    assert receipt["max_abs_logit_diff"] <= receipt["tolerance"]
    nats = {
        name: read_json(finished / f"evaluation/{name}.json")["metrics"]["heldout_perplexity/bits_per_byte"]["value"]
        for name in ("dense", "step0", "trained", "dense_ct")
    }
    assert nats["step0"] == pytest.approx(nats["dense"], rel=1e-4)
    assert nats["trained"] < nats["dense"] - 0.05
    assert nats["dense_ct"] < nats["dense"] - 0.05


def test_a_second_run_skips_every_stage(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    for name in STAGES:
        answer = run_in_own_process(name, finished)
        assert (answer.status, answer.text) == (0, f"[{name}] done before, from the same inputs\n")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.full
def test_a_stage_done_again_to_the_same_result_reruns_nothing_else(copy: Path) -> None:
    for name in ("import", "upcycle", "export"):
        (copy / name / MARKER).unlink()
    texts = {name: run_in_own_process(name, copy).text for name in STAGES}
    done_again = [name for name in STAGES if f"[{name}] done in" in texts[name]]
    assert done_again == ["import", "upcycle", "export"]


@pytest.mark.full
def test_the_evaluation_says_which_model_of_how_many(copy: Path) -> None:
    (copy / "evaluate" / MARKER).unlink()
    dense = read_json(copy / "import" / MARKER)["outputs"]["dense_folder"]
    lines = run_in_own_process("evaluate", copy).text.splitlines()
    assert [line for line in lines if " of 4: " in line] == [
        f"[evaluate] model 1 of 4: dense (parent), {dense}",
        f"[evaluate] model 2 of 4: step0 (MoE at step 0), {copy / 'upcycle/hf'}",
        f"[evaluate] model 3 of 4: trained (trained MoE), {copy / 'hf'}",
        f"[evaluate] model 4 of 4: dense_ct (trained baseline), {copy / 'dense_ct/hf'}",
    ]


@pytest.mark.full
def test_changed_evaluation_settings_rerun_only_evaluate_and_report(copy: Path, tmp_path: Path) -> None:
    items = len((copy / "suite/heldout_perplexity.jsonl").read_text().splitlines())
    changed = tmp_path / "evaluation.yaml"
    changed.write_text(EVALUATION.replace("WINDOWS", "2"))
    replace(RunPlan.read(copy), evaluation=str(changed)).write(copy)
    answers = {name: run_in_own_process(name, copy) for name in STAGES}
    assert all(answer.status == 0 for answer in answers.values())
    assert [name for name in STAGES if f"[{name}] done in" in answers[name].text] == ["evaluate", "report"]
    assert (items, len((copy / "suite/heldout_perplexity.jsonl").read_text().splitlines())) == (4, 2)


def test_a_comment_in_a_settings_file_changes_nothing_and_a_value_does(plan: RunPlan, tmp_path: Path) -> None:
    edited = tmp_path / "evaluation.yaml"

    def setting(text: str) -> object:
        edited.write_text(text)
        return replace(plan, evaluation=str(edited)).setting("evaluation")

    before = setting("tasks: {}\n")
    assert setting("# a comment\ntasks: {}\n") == before
    assert setting("tasks: {mmlu: [0]}\n") != before


def test_training_refuses_to_resume_from_changed_inputs(copy: Path) -> None:
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe

    work = [path for path in (copy / "dense_ct").rglob("*") if path.name != ".lock"]  # some releases write to it
    before = sorted((path, path.stat().st_mtime_ns) for path in work)
    recipe = load_recipe(RunPlan.read(copy).dense_ct)
    recipe.optim.config.lr = 5e-4
    replace(RunPlan.read(copy), dense_ct=dump_recipe(recipe)).write(copy)
    answer = run_in_own_process("dense_ct", copy)
    assert answer.status == 2
    assert "work started from other inputs (dense_ct.optim.config.lr was 0.001, is 0.0005)" in answer.text
    assert f"delete {copy / 'dense_ct'} to lose that work" in answer.text
    after = sorted((path, path.stat().st_mtime_ns) for path in (copy / "dense_ct").rglob("*"))
    assert [entry for entry in before if entry not in after] == []
    answer = run_in_own_process("export", copy)
    assert answer.status == 2
    assert "[export] not started: stage 'dense_ct' has not finished" in answer.text


@pytest.mark.full
def test_a_finished_training_goes_on_for_more_steps_on_more_ranks(copy: Path) -> None:
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe

    recipe = load_recipe(RunPlan.read(copy).dense_ct)
    recipe.trainer.max_steps, recipe.trainer.devices, recipe.log.ckpt.every_n_train_steps = 8, 2, 1
    replace(RunPlan.read(copy), dense_ct=dump_recipe(recipe)).write(copy)
    answer = run_in_own_process("dense_ct", copy, ranks=2)
    assert answer.status == 0, answer.text
    said = [line.rpartition("changed setting: ")[2] for line in answer.text.splitlines() if "changed setting" in line]
    assert said == [
        "dense_ct steps was 6, is 8",
        "dense_ct.log.ckpt.every_n_train_steps was 2, is 1",
        "dense_ct.trainer.devices was 1, is 2",
    ]
    lines = [json.loads(line) for line in (copy / "dense_ct/metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if "loss" in line}
    assert [*rates] == [*range(1, 9)]
    assert {rates[7], rates[8]} == {1e-5}  # where the schedule that it was started with has ended
    assert [name for name in STAGES[:4] if not (copy / name / MARKER).is_file()] == []
    assert run_in_own_process("upcycle", copy).text.endswith("done before, from the same inputs\n")


@pytest.mark.full
def test_later_stages_refuse_after_a_failed_one(plan: RunPlan, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    replace(plan, dense=str(tmp_path / "absent")).write(run_dir)
    answer = run_in_own_process("import", run_dir)
    assert answer.status == 2
    assert answer.text.startswith("[import] ") or "\n[import] " in answer.text
    assert "absent" in answer.text
    assert "Traceback" not in answer.text
    for name in STAGES[1:]:
        answer = run_in_own_process(name, run_dir)
        assert answer.status == 2
        assert f"[{name}] not started: stage 'import' has not finished in {run_dir}" in answer.text
    assert {path.name for path in run_dir.iterdir()} <= {"pipeline.json", "import", "dense"}


def _hold(run_dir: str) -> Any:
    from filelock import FileLock

    with FileLock(Path(run_dir) / "export/.lock"):
        return _stage("export", run_dir, None)


def test_two_runs_do_not_share_a_folder(copy: Path) -> None:
    (copy / "export" / MARKER).unlink()
    (answer,) = run_ranks(_hold, 1, str(copy), process_group=False)
    assert answer.status == 2
    assert "in use by another run" in answer.text
