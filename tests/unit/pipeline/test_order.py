"""What a part of the chain needs of the stages before it, and whose a folder is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.checks import check_started
from nemo_upcycle.pipeline.order import before
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.files import write_json


def plan_of() -> RunPlan:
    training = json.dumps({"recipe": "tiny", "overrides": []})  # Bridge's: it says its settings without being built
    return RunPlan("tiny", "asset://smollm2-135m", "sotu", "demo", training, training, trainer="bridge")


def test_a_stage_needs_what_those_that_it_reads_need() -> None:
    needed = [stage.name for stage in before(plan_of(), "export")]
    assert needed == ["import", "data", "pretrain", "dense_ct"]  # whoever exports needs no check of step 0
    assert [stage.name for stage in before(plan_of(), "pretrain")] == ["import", "data", "upcycle"]


def test_a_folder_of_something_else_is_refused_with_one_that_is_not(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "data/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_json(tmp_path / "data/_SUCCESS.json", {"kind": "a finished folder of the user's, called as a stage is"})
    with pytest.raises(UpcycleError, match=r"got a folder with a\.txt, b\.txt, data, ") as refused:
        check_started(tmp_path, plan_of())
    fixed = Path(refused.value.fix.partition("dir=")[2])
    assert fixed.is_relative_to(tmp_path)
    check_started(fixed, plan_of())


@pytest.mark.parametrize("name", [".DS_Store", "lost+found", "logs", "train.log", "nohup.out", "slurm-7.err"])
def test_what_is_there_before_a_run_starts_does_not_matter(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    check_started(tmp_path, plan_of())


def test_a_run_keeps_its_folder_whatever_lies_there(tmp_path: Path) -> None:
    """With a plan, or, where that is lost, with a stage that was started."""
    plan = plan_of()
    (tmp_path / "notes.txt").touch()
    plan.stage("import").folder(tmp_path, plan).start({}, resumable=False)
    check_started(tmp_path, plan)
    (tmp_path / "import/_STARTED.json").unlink()
    with pytest.raises(UpcycleError, match=r"notes\.txt"):
        check_started(tmp_path, plan)
    write_json(tmp_path / plan.file, {})
    check_started(tmp_path, plan)
