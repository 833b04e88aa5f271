"""What the pipeline asks of executors."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import nemo_run as run
import pytest
import torch

from nemo_upcycle.pipeline.launch import sized, variables_for


@dataclass(kw_only=True)
class Kubeflow(run.Executor):
    """Has the fields of NeMo-Run's KubeflowExecutor, and like its client a lock, which has no deep copy."""

    num_nodes: int = 1
    nprocs_per_node: int | None = None

    def __post_init__(self) -> None:
        self.client = threading.RLock()


def test_an_executor_gets_nodes_and_ranks_by_its_own_names() -> None:
    mine = Kubeflow()
    changed = sized(mine, 4, 8)
    assert (changed.num_nodes, changed.nprocs_per_node, mine.num_nodes) == (4, 8, 1)
    assert not hasattr(changed, "nodes")
    slurm = sized(run.SlurmExecutor(account="me"), 4, 8)
    assert (slurm.nodes, slurm.ntasks_per_node) == (4, 8)
    with pytest.raises(AttributeError):
        changed.ntasks_per_node  # noqa: B018


def test_threads_are_the_users_where_set_and_else_do_not_outnumber_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert variables_for(1, None) == {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert variables_for(10_000, None) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert variables_for(2, None) == {"OMP_NUM_THREADS": "3"}
    mine = run.LocalExecutor(env_vars={"OMP_NUM_THREADS": "5", "MINE": "1"})
    assert variables_for(2, mine) == {"OMP_NUM_THREADS": "5", "MINE": "1"}
