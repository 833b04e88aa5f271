"""What a pod of the Kubernetes executor does with its command, with real processes: ranks, SIGTERM, status, output."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.pipeline.executors import local, manifests
from nemo_upcycle.pipeline.executors.jobs import Job
from tests.crds import executor
from tests.waiting import HANG_S, wait_until


SAVES = """
import os, signal, sys, time
def save(*_):
    time.sleep(1)
    open(sys.argv[1] + "/saved" + os.environ.get("RANK", ""), "w").close()
    print("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(sys.argv[1] + "/started" + os.environ.get("RANK", ""), "w").close()
time.sleep(600)
"""


def _started(tmp_path: Path, code: str, ranks: int) -> subprocess.Popen[bytes]:
    job = Job("pretrain", tmp_path, ("python", "-c", code, str(tmp_path)), ranks_per_node=ranks, is_training=True)
    document = manifests.manifest(executor("trainjob-2.3", tmp_path, python=sys.executable), job, "a")
    # What the operator sets for one node.
    variables = {"PET_NNODES": "1", "PET_NPROC_PER_NODE": str(ranks), "PET_NODE_RANK": "0", "PYTHONUNBUFFERED": "1"}
    command = document["spec"]["trainer"]["command"]
    return subprocess.Popen(command, env={**os.environ, **variables, "PET_MASTER_PORT": "0"}, start_new_session=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_leaves_ranks_the_time_to_save(ranks: int, tmp_path: Path) -> None:
    process = _started(tmp_path, SAVES, ranks)
    try:
        wait_until(lambda: len(list(tmp_path.glob("started*"))) == ranks, process)
        os.kill(process.pid, signal.SIGTERM)  # as the kubelet does: the first process alone
        assert process.wait(HANG_S) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert len(list(tmp_path.glob("saved*"))) == ranks
    assert (tmp_path / "jobs" / "pretrain" / "a-node0.log").read_text().count("saved") == ranks


def test_the_status_of_a_stage_is_that_of_its_pod_and_its_words_are_kept(tmp_path: Path) -> None:
    assert _started(tmp_path, "import sys; sys.exit(print('a mistake') or 2)", 1).wait(HANG_S) == 2
    assert (tmp_path / "jobs" / "pretrain" / "a-node0.log").read_text() == "a mistake\n"


def test_two_nodes_find_each_other_by_what_the_operators_set(tmp_path: Path) -> None:
    code = "import os, sys; open(sys.argv[1] + '/rank' + os.environ['RANK'], 'w').write(os.environ['WORLD_SIZE'])"
    job = Job("pretrain", tmp_path, ("python", "-c", code, str(tmp_path)), nodes=2, is_training=True)
    document = manifests.manifest(executor("trainjob-2.3", tmp_path, python=sys.executable), job, "a")
    with local.held_port() as port:
        shared = {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_MASTER_ADDR": "127.0.0.1"}
        shared |= {"PET_MASTER_PORT": str(port)}
        nodes = [
            subprocess.Popen(
                document["spec"]["trainer"]["command"], env={**os.environ, **shared, "PET_NODE_RANK": str(number)}
            )
            for number in range(2)
        ]
        assert [node.wait(HANG_S) for node in nodes] == [0, 0]
    assert [(tmp_path / f"rank{number}").read_text() for number in range(2)] == ["2", "2"]
    assert len(list(job.folder.glob("a-node?.log"))) == 2


def test_pods_keep_models_of_the_hub_in_the_run_unless_the_site_says_where(tmp_path: Path) -> None:
    def names(**fields: Any) -> set[str]:
        settings = executor("trainjob-2.3", tmp_path, **fields)
        trainer = manifests.manifest(settings, Job("import", tmp_path / "demo", ("python",)), "a")["spec"]["trainer"]
        return {f"{entry['name']}={entry.get('value')}" for entry in trainer["env"]}

    assert f"HF_HUB_CACHE={tmp_path}/demo/hub" in names()
    assert not any(name.startswith("HF_HUB_CACHE") for name in names(env_vars={"HF_HOME": "/data/hf"}))
