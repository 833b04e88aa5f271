"""What a part of the chain needs of the stages before it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.order import before, chosen_stages, require_earlier, require_outputs
from nemo_upcycle.pipeline.stages import STAGES, RunPlan
from tests.blends import write_blend
from tests.models import write_llama, write_tokenizer
from tests.unit.sources.test_checkpoints import write


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run whose stages are done, with what they left."""
    folder = tmp_path / "run"
    for model in ("dense", "upcycle/hf", "hf", "dense_ct/hf"):
        write_llama(folder / model)
        write_tokenizer(folder / model)
    write_blend(folder / "data/blend", folder / "dense")
    for name in ("pretrain", "dense_ct"):
        write(folder / name / "checkpoints", 9)
    for stage in STAGES:
        inputs = stage.inputs(folder, plan_of())
        stage.folder(folder, plan_of()).finish(inputs, 1.0, {"dense_folder": str(folder / "dense")})
    return folder


def plan_of() -> RunPlan:
    training = json.dumps({"recipe": "tiny", "overrides": []})  # Bridge's: it says its settings without being built
    return RunPlan("tiny", "asset://smollm2-135m", "sotu", "demo", training, training, trainer="bridge")


def rerun(run_dir: Path, name: str) -> None:
    """Let a stage have to run."""
    (run_dir / name / "_SUCCESS.json").unlink()


def lose_tokens(run_dir: Path) -> None:
    next((run_dir / "data/blend/tokens").glob("*.bin")).unlink()


def lose(path: str) -> Callable[[Path], None]:
    def delete(run_dir: Path) -> None:
        target = run_dir / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return delete


@pytest.mark.parametrize(
    ("damage", "lost", "stage"),
    [
        (lose("dense/model.safetensors"), "import", "data"),
        (lose_tokens, "data", "pretrain"),
        (lose_tokens, "data", "export"),
        (lose("upcycle/hf"), "upcycle", "evaluate"),
        (lose("pretrain/checkpoints"), "pretrain", "export"),
        (lose("dense_ct/checkpoints"), "dense_ct", "export"),
        (lose("dense_ct/hf/config.json"), "export", "evaluate"),
    ],
)
def test_lost_outputs_are_refused_with_the_stage_to_run_again(
    run_dir: Path, damage: Callable[[Path], None], lost: str, stage: str
) -> None:
    rerun(run_dir, stage)
    only = chosen_stages(None, None, stage)
    require_earlier(only, run_dir, plan_of())
    damage(run_dir)
    with pytest.raises(UpcycleError, match=rf"outputs of stage '{lost}' .*--from {lost}"):
        require_earlier(only, run_dir, plan_of())


def test_a_stage_needs_what_those_that_it_reads_need() -> None:
    needed = [stage.name for stage in before(plan_of(), "export")]
    assert needed == ["import", "data", "pretrain", "dense_ct"]  # whoever exports needs no check of step 0
    assert [stage.name for stage in before(plan_of(), "pretrain")] == ["import", "data", "upcycle"]


def test_outputs_that_no_stage_reads_any_more_may_be_gone(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "pretrain/checkpoints")
    lose_tokens(run_dir)
    rerun(run_dir, "report")
    require_outputs(STAGES, run_dir, plan_of())


def test_outputs_of_a_stage_that_runs_again_may_be_gone(run_dir: Path) -> None:
    lose_tokens(run_dir)
    rerun(run_dir, "data")
    require_outputs(STAGES, run_dir, plan_of())
