"""What the pipeline asks of executors."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import nemo_run as run
import pytest

from nemo_upcycle.pipeline.launch import sized


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
