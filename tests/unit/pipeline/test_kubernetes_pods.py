"""How a pod of the Kubernetes executor runs its command, with real processes: ranks, SIGTERM, status, output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemo_upcycle.pipeline.executors import local, manifests
from nemo_upcycle.pipeline.executors.jobs import Job
from tests.crds import executor
from tests.waiting import HANG_S, wait_until


SAVES = """
import os, signal, sys, time
rank = os.environ.get("RANK", "")
def save(*_):
    time.sleep(0.5)
    open(sys.argv[1] + "/saved" + rank, "w").close()
    print("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + "/started" + rank, "w").write(os.environ.get("WORLD_SIZE", "none"))
time.sleep(600)
"""


@pytest.fixture
def port() -> Iterator[int]:
    """A port for the first node's store."""
    with local.held_port() as held:
        yield held


def _start(tmp_path: Path, code: str, port: int, nodes: int = 1, ranks: int = 1) -> list[subprocess.Popen[bytes]]:
    """Start the pods of a stage, one per node, with the environment that the operator sets."""
    command = ("python", "-c", code, str(tmp_path))
    job = Job("pretrain", tmp_path, command, nodes=nodes, ranks_per_node=ranks, is_training=True)
    document = manifests.manifest(executor("trainjob-2.3", tmp_path, python=sys.executable), job, "a")
    shared = {"PET_NNODES": str(nodes), "PET_NPROC_PER_NODE": str(ranks), "PYTHONUNBUFFERED": "1"}
    shared |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            document["spec"]["trainer"]["command"],
            env=os.environ | shared | {"PET_NODE_RANK": str(number)},
            start_new_session=True,
        )
        for number in range(nodes)
    ]


@pytest.mark.parametrize(
    ("nodes", "ranks", "world_size"), [(1, 1, "none"), pytest.param(2, 2, "4", marks=pytest.mark.full)]
)
def test_sigterm_leaves_ranks_the_time_to_save(
    nodes: int, ranks: int, world_size: str, port: int, tmp_path: Path
) -> None:
    processes = _start(tmp_path, SAVES, port, nodes, ranks)
    try:
        wait_until(lambda: len([one for one in tmp_path.glob("started*") if one.read_text()]) == nodes * ranks)
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)  # like the kubelet, signal only the first process
        assert [process.wait(HANG_S) for process in processes] == [0] * nodes
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert {one.read_text() for one in tmp_path.glob("started*")} == {world_size}
    assert len(list(tmp_path.glob("saved*"))) == nodes * ranks
    logs = [tmp_path / f"jobs/pretrain/a-node{number}.log" for number in range(nodes)]
    assert [log.read_text().count("saved") for log in logs] == [ranks] * nodes


def test_a_stage_has_its_pods_status(tmp_path: Path, port: int) -> None:
    (process,) = _start(tmp_path, "import sys; sys.exit(print('a mistake') or 2)", port)
    assert process.wait(HANG_S) == 2
    assert (tmp_path / "jobs" / "pretrain" / "a-node0.log").read_text() == "a mistake\n"
