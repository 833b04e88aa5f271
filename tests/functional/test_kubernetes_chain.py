"""`nemo upcycle pipeline` on Kubernetes: a real API server, and a stand-in for the operator that runs the commands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemo_upcycle.utils.files import MARKER, read_json
from tests.functional.kubernetes_operator import Operator
from tests.functional.kubernetes_server import IS_BUILT, define, server
from tests.functional.soak import training_result
from tests.functional.stages import STAGES
from tests.functional.tiny import write_inputs
from tests.waiting import HANG_S, wait_until


ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.full,
    pytest.mark.skipif(not IS_BUILT, reason="no API server here: `make test-k8s` builds it"),
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
    pytest.mark.filterwarnings("ignore:HTTPResponse.getheader:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with server(tmp_path_factory.mktemp("cluster")) as found:
        define(found, "trainjob-2.3")
        yield found


@pytest.fixture
def operator(kubeconfig: Path) -> Iterator[Operator]:
    thread = Operator(kubeconfig)
    thread.environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SLOW_S": "2.0"}
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("kubernetes"))


class Run:
    """The command."""

    def __init__(self, inputs: Path, kubeconfig: Path, name: str, *words: str) -> None:
        self.run_dir, self.log = inputs / name, inputs / f"{name}.txt"
        script = inputs / "cluster.py"  # which the pods have to see
        shutil.copy(ROOT / "tests/functional/slurm_cluster.py", script)
        executor = {
            "image": "tests",
            "claim": "runs",
            "mount_path": inputs,
            "python": sys.executable,
            "kubeconfig": kubeconfig,
            "report_within_s": 60,
        }
        command = [sys.executable, str(script), "--factory", f"tiny(inputs='{inputs}', dir='{self.run_dir}')"]
        command += ["run.executor=kubernetes", *(f"run.executor.{name}={value}" for name, value in executor.items())]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *words, "--yes"], env=environment, stdout=log, stderr=log)

    def text(self) -> str:
        """Return what it has written."""
        return self.log.read_text(errors="replace")

    def wait_for(self, found: Callable[[], object]) -> None:
        """Wait for something while the command runs."""
        wait_until(found, self.process, self.text)


def test_a_chain_runs_and_a_training_goes_on_after_an_eviction(
    inputs: Path, kubeconfig: Path, operator: Operator
) -> None:
    run = Run(inputs, kubeconfig, "whole")
    metrics = run.run_dir / "pretrain/metrics.jsonl"
    run.wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3)
    operator.evict(read_json(run.run_dir / "jobs.json")["jobs"]["pretrain"])
    assert run.process.wait(timeout=HANG_S) == 0, run.text()
    assert all((run.run_dir / name / MARKER).is_file() for name in STAGES)
    assert "[pretrain] stopped" in run.text()
    assert run.text().count("[pretrain] submitted: ") == 2
    other = Run(inputs, kubeconfig, "undisturbed", "--until", "pretrain")
    assert other.process.wait(timeout=HANG_S) == 0, other.text()
    assert training_result(run.run_dir / "pretrain") == training_result(other.run_dir / "pretrain")
