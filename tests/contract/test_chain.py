"""The chain of stages around a training is killed, stopped, and run again with other settings or more steps."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.init.calibration_file import NAME, Calibration
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.sources.checkpoints import newest_checkpoint, steps_in
from nemo_upcycle.utils.files import MARKER, is_complete, read_json
from tests.blends import write_blend
from tests.contract.trainers import IS_BRIDGE, losses, metrics, setting_name, train, training_text, write_plan
from tests.functional.stages import STAGES, run_in_own_process, run_stages
from tests.functional.started import start_training
from tests.functional.tiny import EVALUATION, texts, write_finished_inputs
from tests.models import write_tokenizer
from tests.parents import (
    put_around,
    write_granite,
    write_hyperclovax,
    write_mixtral,
    write_qwen3_moe,
    write_qwen35,
)
from tests.waiting import HANG_S


pytestmark = pytest.mark.slow
#: Inputs that a plan names.
NAMED = ("parent", "blend", "evaluation.yaml")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent, its tokenised texts and a suite."""
    return write_finished_inputs(tmp_path_factory.mktemp("inputs"))


def _plan(inputs: Path, run_dir: Path, **changes: float) -> None:
    """Write the plan of a chain on two ranks; the first rank of the baseline computes no loss."""
    texts = [training_text({"ep": 2} | changes, ranks=2), training_text({"pp": 2}, kind="dense_ct", ranks=2)]
    write_plan(run_dir, *(inputs / name for name in NAMED), *texts)


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all stages; upcycle and pretrain were killed in the middle and run again."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    _plan(inputs, run_dir)
    killed = {"upcycle": ("upcycle/.hf.partial", 0), "pretrain": ("pretrain/metrics.jsonl", 3)}
    run_stages(run_dir, ranks=2, killed=killed)
    return run_dir


def test_a_killed_chain_completes(finished: Path) -> None:
    assert all((finished / name / MARKER).is_file() for name in STAGES)
    assert list(finished.rglob("*.partial")) == []
    assert all(is_complete(finished / name) for name in ("hf", "upcycle/hf", "dense_ct/hf", "suite"))
    assert read_json(finished / "pretrain/receipt.json")["ranks"] == 2
    for stage in ("pretrain", "dense_ct"):
        lines = metrics(finished / stage)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert all(("router" in line) == (stage == "pretrain") for line in lines)
        assert len(losses(finished / stage, "validation_loss")) >= 2


def test_step_0_equals_the_parent_and_training_improves_it(finished: Path) -> None:
    receipt = read_json(finished / "receipt.json")
    assert receipt["within_tolerance"] is True
    assert receipt["max_abs_logit_diff"] <= receipt["tolerance"]
    bits = {
        name: read_json(finished / f"evaluation/{name}.json")["metrics"]["heldout_perplexity/bits_per_byte"]["value"]
        for name in ("dense", "step0", "trained", "dense_ct")
    }
    assert bits["step0"] == pytest.approx(bits["dense"], rel=1e-4)
    assert bits["trained"] < bits["dense"] - 0.05
    assert bits["dense_ct"] < bits["dense"] - 0.05


def test_the_report_shows_the_training_and_samples(finished: Path) -> None:
    results = read_json(finished / "results.json")
    for stage in ("pretrain", "dense_ct"):
        done = results["training"][stage]
        assert (done["tokens"], done["settings"]["ranks"]) == (6 * 4 * 64, 2)
        assert done["tflops_per_gpu"]["full"] > done["tflops_per_gpu"]["causal"] > 0
        assert done["memory_gib"] > 0.1
    assert len(results["samples"]) == 2
    for sample in results["samples"]:
        assert list(sample["continuations"]) == ["dense", "trained", "dense_ct"]
        assert all(sample["continuations"].values())
    said = "The chain works, and the MoE equals its parent at step 0. 6 steps are too few"
    assert said in (finished / "report.md").read_text()


def test_a_second_run_skips_every_stage(finished: Path, inputs: Path) -> None:
    """Change a comment in a settings file, which must not make any stage run again."""
    with (inputs / "evaluation.yaml").open("a") as settings:
        settings.write("# a comment\n")
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    for name in STAGES:
        answer = run_in_own_process(name, finished)
        assert (answer.status, answer.text) == (0, f"[{name}] done earlier, from the same inputs\n")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.full
def test_changed_evaluation_settings_rerun_only_evaluate_and_report(finished: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "evaluation.yaml").write_text(EVALUATION.replace("WINDOWS", "2"))
    replace(RunPlan.read(run_dir), evaluation=str(tmp_path / "evaluation.yaml")).write(run_dir)
    texts = {name: run_in_own_process(name, run_dir).text for name in STAGES}
    assert [name for name in STAGES if f"[{name}] done in" in texts[name]] == ["evaluate", "report"]
    assert len((run_dir / "suite/heldout_perplexity.jsonl").read_text().splitlines()) == 2


@pytest.mark.full
def test_a_started_training_takes_only_more_steps(finished: Path, inputs: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(finished, tmp_path / "run")
    _plan(inputs, run_dir, lr=5e-4)
    answer = run_in_own_process("pretrain", run_dir)  # the first rank is enough: it refuses before it waits
    assert answer.status == 2
    assert f"changed after its work started: pretrain.{setting_name('lr')} was " in answer.text
    assert f"delete {run_dir / 'pretrain'}, which loses the work" in answer.text
    assert [line["step"] for line in metrics(run_dir / "pretrain")] == [1, 2, 3, 4, 5, 6]
    _plan(inputs, run_dir, steps=8, save_every=4)
    answer = run_in_own_process("pretrain", run_dir, ranks=2)
    assert answer.status == 0, answer.text
    said = {line.rpartition("changed setting: ")[2] for line in answer.text.splitlines() if "changed setting" in line}
    assert said == {"pretrain steps was 6, is 8", f"pretrain.{setting_name('save_every')} was 2, is 4"}
    assert [line["step"] for line in metrics(run_dir / "pretrain")] == [*range(1, 9)]
    answer = run_in_own_process("report", run_dir)
    assert answer.status == 2
    assert "[report] Stage did not start: stage 'export' has not finished" in answer.text


WITH_LOADERS = (
    {"train.exit_signal_handler": "true", "dataset.num_workers": 2, "validation.eval_iters": 0}
    if IS_BRIDGE
    else {"data.num_workers": 2, "trainer.limit_val_batches": 0, "trainer.val_check_interval": 1}
)


def _with_loaders() -> str:
    text = training_text({"steps": 350, "save_every": 1000} | WITH_LOADERS)
    if IS_BRIDGE:
        return text
    import nemo_run as run

    from nemo_upcycle.trainers.nemo.recipes import dump_recipe, load_recipe
    from nemo_upcycle.trainers.nemo.stopping import SaveOnSignal

    recipe = load_recipe(text)
    recipe.trainer.callbacks.append(run.Config(SaveOnSignal))  # runs after the callback that writes a step's line
    return dump_recipe(recipe)


@pytest.mark.full
@pytest.mark.weekly
def test_a_stopped_job_with_loaders_saves_and_resumes(inputs: Path, tmp_path: Path) -> None:
    """A scheduler's SIGTERM reaches all processes of a job, but data loaders must last until the checkpoint exists."""
    run_dir = tmp_path / "run"
    write_plan(run_dir, *(inputs / name for name in NAMED), _with_loaders())
    run_stages(run_dir, STAGES[:3])
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
    steps = [line["step"] for line in metrics(run_dir / "pretrain")]
    assert steps == list(range(1, len(steps) + 1))


def _calibrated(folder: Path) -> str:
    """Write a prompt for each of eight expert copies; return a training whose router is made from the prompts."""
    (folder / "prompts.yaml").write_text("".join(f"- the {word} of it\n" for word in "abcdefgh"))
    settings: dict[str, Any] = {"spec.router_init": "prompts", "spec.router_prompts": str(folder / "prompts.yaml")}
    return training_text(settings | {"spec.router_spread": 0.5, "steps": 2}, ranks=2)


@pytest.mark.full
def test_a_chain_makes_its_own_calibration_and_trains_with_it(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_plan(run_dir, *(inputs / name for name in NAMED), _calibrated(tmp_path))
    run_stages(run_dir, STAGES[:4], ranks=2)
    step0, trained = read_json(run_dir / "receipt.json"), read_json(run_dir / "pretrain/receipt.json")
    assert step0["within_tolerance"] is True
    digest = Calibration(run_dir / "upcycle" / NAME).sha256
    assert step0["calibration"] == {"path": str(run_dir / "upcycle" / NAME), "sha256": digest}
    assert trained["calibration"] == {"path": str(run_dir / "pretrain" / NAME), "sha256": digest}
    assert (trained["spec"]["router_spread"], trained["ranks"]) == (0.5, 2)


@pytest.mark.full
def test_the_first_rank_makes_the_file(inputs: Path, tmp_path: Path) -> None:
    train(_calibrated(tmp_path), tmp_path / "run", inputs / "parent", inputs / "blend", ranks=2)
    assert read_json(tmp_path / "run/receipt.json")["calibration"]["path"] == str(tmp_path / "run" / NAME)


def _made_from(parent: Path, spec: UpcycleSpec | None) -> str:
    """Return a training of NeMo that starts from a parent."""
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from tests.functional.stock import made_from

    return dump_recipe(made_from(str(parent), spec))


def _grown(parent: Path) -> list[str]:
    """Return two trainings (in Bridge on two ranks): a parent's four experts grown to eight, and the parent itself."""
    if IS_BRIDGE:
        return [training_text(kind=kind, ranks=2) for kind in ("tiny_grown", "dense_ct")]
    specs = (UpcycleSpec(num_experts=8, top_k=4, router_std=0.0), None)
    return [_made_from(parent, spec) for spec in specs]


#: Class around a text model -> writer of the text model, and class of the MoE.
SEEING: dict[str, tuple[Callable[..., Path], str]] = {"GraniteDocling": (write_granite, "GraniteMoe")}
#: Two layers: gated delta nets compute in float32 in every run, and in four random layers step 0 differs by 4e-4.
_WITH_NETS = partial(write_qwen35, layers=2, full_attention_interval=2)
if IS_BRIDGE:
    SEEING = {
        "HyperCLOVAXVisionV2": (partial(write_hyperclovax, use_post_norm=False), "GraniteMoe"),
        "MiniCPMV4_7": (_WITH_NETS, "Qwen3_5Moe"),
        "MiniCPMOcr": (_WITH_NETS, "Qwen3_5Moe"),
    }


@pytest.mark.full
@pytest.mark.parametrize("kind", SEEING)
def test_a_vision_language_models_text_goes_through_the_chain(tmp_path: Path, kind: str) -> None:
    write, hf_class = SEEING[kind]
    parent = put_around(write_tokenizer(write(tmp_path / "parent", vocab_size=259)), kind)
    write_blend(tmp_path / "blend", parent, texts=texts())
    (tmp_path / "evaluation.yaml").write_text(EVALUATION.replace("WINDOWS", "4"))
    run_dir, spec = tmp_path / "run", UpcycleSpec(num_experts=4, top_k=2)
    made = training_text(kind="tiny", ranks=2) if IS_BRIDGE else _made_from(parent, spec)
    write_plan(run_dir, *(tmp_path / name for name in NAMED), made)
    run_stages(run_dir, ranks=2 if IS_BRIDGE else 1)
    receipt = read_json(run_dir / "receipt.json")
    assert (receipt["exact"], receipt["within_tolerance"]) == (True, True)
    arch = read_architecture(run_dir / "hf")
    assert (arch.hf_class, arch.num_experts) == (f"{hf_class}ForCausalLM", 4)
    assert (run_dir / "report.md").is_file()


@pytest.mark.full
def test_a_parent_with_experts_goes_through_the_chain(tmp_path: Path) -> None:
    write, kind = (write_mixtral, "Mixtral") if IS_BRIDGE else (write_qwen3_moe, "Qwen3Moe")
    parent = write_tokenizer(write(tmp_path / "parent", vocab_size=259, rope_theta=1e6, rms_norm_eps=1e-6))
    write_blend(tmp_path / "blend", parent, texts=texts())
    (tmp_path / "evaluation.yaml").write_text(EVALUATION.replace("WINDOWS", "4"))
    run_dir = tmp_path / "run"
    write_plan(run_dir, *(tmp_path / name for name in NAMED), *_grown(parent))
    run_stages(run_dir, ranks=2 if IS_BRIDGE else 1)
    receipt, trained = (read_json(run_dir / name / "receipt.json") for name in ("", "pretrain"))
    assert (receipt["within_tolerance"], receipt["parent_experts"]) == (True, 4)
    assert receipt["exact"] or IS_BRIDGE
    assert trained["bytes_read"] == trained["bytes_needed"]
    assert losses(run_dir / "pretrain")[0] == pytest.approx(losses(run_dir / "dense_ct")[0], rel=1e-5)
    for name, experts in (("upcycle/hf", 8), ("hf", 8), ("dense_ct/hf", 4)):
        arch = read_architecture(run_dir / name)
        assert (arch.hf_class, arch.num_experts, arch.top_k) == (f"{kind}ForCausalLM", experts, experts // 2)
    report = (run_dir / "report.md").read_text()
    assert "→ MoE of 8 experts, top-4" in report
    assert "dense parent" not in report
    assert "dense baseline" not in report
