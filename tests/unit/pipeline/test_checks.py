"""Whose a folder is, before a run writes into it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.checks import check_demo_data, check_started
from nemo_upcycle.trainers.bridge.training import BridgeTraining
from nemo_upcycle.utils.files import write_json
from tests.unit.pipeline.test_order import plan_of


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


def test_a_chain_for_gpus_never_reads_the_demos_texts() -> None:
    plans = [replace(plan_of(), pretrain=BridgeTraining("tiny", ranks_per_node=ranks).to_text()) for ranks in (2, 8)]
    check_demo_data(plans[0])
    with pytest.raises(UpcycleError, match=r"pretrain trains on GPUs, .* Fix: add data=FOLDER"):
        check_demo_data(plans[1])


def test_what_is_there_before_a_run_starts_does_not_matter(tmp_path: Path) -> None:
    for name in (".DS_Store", "lost+found", "logs", "train.log", "nohup.out", "slurm-7.err"):
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
