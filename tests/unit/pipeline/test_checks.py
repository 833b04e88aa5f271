"""The checks before a run are the same for a dry run and a start, and find whether a folder belongs to the run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.checks import check_demo_data, check_run, check_started
from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.site_file import cluster_for, read_executor
from nemo_upcycle.pipeline.stage_jobs import jobs_of
from nemo_upcycle.pipeline.stages import STAGES
from nemo_upcycle.trainers.bridge.training import BridgeTraining
from nemo_upcycle.utils.files import write_json
from tests.golden.forecasts import plan_of as plan_of_chain
from tests.unit.pipeline.test_order import plan_of


PAGE = Path(__file__).parents[3] / "docs/clusters.md"
#: The executor file on the page, and a pattern for its lines that give GPUs to the baseline and the evaluation.
SHOWN = re.search(r"```yaml\n(# h100.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
WITHOUT_GPUS = re.compile(r"^  (dense_ct|evaluate): .*\n", re.MULTILINE)


def _cluster(folder: Path, text: str) -> Cluster:
    (folder / "site.yaml").write_text(text, encoding="utf-8")
    cluster = cluster_for(read_executor(str(folder / "site.yaml")))
    assert cluster is not None
    return cluster


def test_a_shown_run_and_a_start_find_the_same(demo: Any, tmp_path: Path) -> None:
    assert SHOWN is not None
    cluster, plan = _cluster(tmp_path, f"{SHOWN[1]}array: 0-3\n"), plan_of_chain(demo)
    found = [
        check_run(tmp_path / "run", plan, STAGES, cluster, detach=False, shown=is_shown) for is_shown in (True, False)
    ]
    shown, started = ([str(error) for error in one.all] for one in found)
    assert shown == started
    assert shown[0].startswith("run.executor.array is 0-3, but cannot be set here")


def test_stages_that_need_gpus_and_ask_for_none_are_named(llama: Any, tmp_path: Path) -> None:
    assert SHOWN is not None
    jobs = jobs_of(STAGES, Path("/shared/run"), plan_of_chain(llama))
    assert _cluster(tmp_path, SHOWN[1]).wrong_settings(jobs) == []
    wrong = _cluster(tmp_path, WITHOUT_GPUS.sub("", SHOWN[1])).wrong_settings(jobs)
    names = [f"run.executor.stages.{stage}.gpus_per_node" for stage in ("dense_ct", "evaluate")]
    assert [error.subject for error in wrong] == names
    assert _cluster(tmp_path, f"{WITHOUT_GPUS.sub('', SHOWN[1])}counts_gpus: false").wrong_settings(jobs) == []


def test_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "data/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_json(tmp_path / "data/_SUCCESS.json", {"kind": "a finished folder of the user's, called as a stage is"})
    with pytest.raises(UpcycleError, match=r"has other files: a\.txt, b\.txt, data\. ") as refused:
        check_started(tmp_path, plan_of())
    fixed = Path(refused.value.fix.partition("dir=")[2])
    assert fixed.is_relative_to(tmp_path)
    check_started(fixed, plan_of())


def test_a_chain_for_gpus_never_reads_the_demos_texts() -> None:
    plans = [replace(plan_of(), pretrain=BridgeTraining("tiny", ranks_per_node=ranks).to_text()) for ranks in (2, 8)]
    check_demo_data(plans[0])
    with pytest.raises(UpcycleError, match=r"and pretrain trains on GPUs\. Add data=FOLDER"):
        check_demo_data(plans[1])


def test_what_is_there_before_a_run_starts_does_not_matter(tmp_path: Path) -> None:
    for name in (".DS_Store", "lost+found", "logs", "train.log", "nohup.out", "slurm-7.err"):
        (tmp_path / name).mkdir()
    check_started(tmp_path, plan_of())


def test_a_run_keeps_its_folder_whatever_lies_there(tmp_path: Path) -> None:
    """The run is recognised by its plan or, if the plan is lost, by a started stage."""
    plan = plan_of()
    (tmp_path / "notes.txt").touch()
    plan.stage("import").folder(tmp_path, plan).start({}, resumable=False)
    check_started(tmp_path, plan)
    (tmp_path / "import/_STARTED.json").unlink()
    with pytest.raises(UpcycleError, match=r"notes\.txt"):
        check_started(tmp_path, plan)
    write_json(tmp_path / plan.file, {})
    check_started(tmp_path, plan)
