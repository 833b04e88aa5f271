"""What the pipeline asks of executors, and says of a stop."""

from __future__ import annotations

import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import nemo_run as run
import pytest
import torch

from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
from nemo_upcycle.pipeline.executors.kubernetes_settings import KubernetesExecutor
from nemo_upcycle.pipeline.executors.slurm import SlurmScheduler, StagedSlurmExecutor
from nemo_upcycle.pipeline.launch import _runs_code_of
from nemo_upcycle.pipeline.run_here import sized, stopped, variables_for
from nemo_upcycle.pipeline.stages import STAGES, RunPlan


@dataclass(kw_only=True)
class Kubeflow(run.Executor):
    """Has the fields of NeMo-Run's KubeflowExecutor, and like its client a lock, which has no deep copy."""

    num_nodes: int = 1
    nprocs_per_node: int | None = None

    def __post_init__(self) -> None:
        self.client = threading.RLock()


def test_sized_sets_the_fields_of_the_executors_class() -> None:
    mine = Kubeflow()
    changed = sized(mine, 4, 8)
    assert (changed.num_nodes, changed.nprocs_per_node, mine.num_nodes) == (4, 8, 1)
    assert not hasattr(changed, "nodes")
    slurm = sized(run.SlurmExecutor(account="me"), 4, 8)
    assert (slurm.nodes, slurm.ntasks_per_node) == (4, 8)
    with pytest.raises(AttributeError):
        changed.ntasks_per_node  # noqa: B018


def test_threads_are_the_users_or_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert variables_for(1, None) == {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert variables_for(10_000, None) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert variables_for(2, None) == {"OMP_NUM_THREADS": "3"}
    mine = run.LocalExecutor(env_vars={"OMP_NUM_THREADS": "5", "MINE": "1"})
    assert variables_for(2, mine) == {"OMP_NUM_THREADS": "5", "MINE": "1"}


def test_a_stage_that_ended_just_before_the_signal_counts_as_finished(tmp_path: Path) -> None:
    plan, stage = RunPlan("tiny", "asset://smollm2-135m", "sotu", "demo", "", None), STAGES[0]
    folder = stage.folder(tmp_path, plan)
    folder.path.mkdir()
    folder.finish(stage.inputs(tmp_path, plan), 1.0, {})
    text = stopped(signal.SIGTERM, [stage], tmp_path, plan)
    assert f"Stopped by SIGTERM in stage 'import'. Kept in {tmp_path}: finished stages: import.\n" in text


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        (SlurmScheduler(StagedSlurmExecutor(account="me")), True),
        (SlurmScheduler(StagedSlurmExecutor(account="me", container_image="a")), False),
        (SlurmScheduler(StagedSlurmExecutor(account="me", container_image="a", container_mounts=["/home:/h"])), True),
        (KubernetesScheduler(KubernetesExecutor(image="a", claim="b", mount_path="/runs")), False),
        (KubernetesScheduler(KubernetesExecutor(claim="b", mount_path="/runs", volumes={"homes": "/home"})), True),
    ],
)
def test_jobs_run_this_code_with_this_interpreter_or_where_it_is_mounted(cluster: Cluster, expected: bool) -> None:
    assert _runs_code_of(cluster, [stage.name for stage in STAGES], Path("/home/me/nemo-upcycle")) is expected
