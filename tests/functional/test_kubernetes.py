"""A real API server with published definitions accepts the Kubernetes executor's jobs, and a whole chain runs.

A stand-in for the operator runs the chain's commands. Pods, claims and webhooks are not tested here.
"""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import manifests
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
from nemo_upcycle.pipeline.executors.kubernetes_api import KubernetesApi
from nemo_upcycle.pipeline.executors.kubernetes_settings import resource_of
from nemo_upcycle.utils.files import MARKER, read_json
from tests.crds import KINDS, RECIPES, executor, jobs_of
from tests.functional.kubernetes_operator import Operator
from tests.functional.kubernetes_server import IS_BUILT, define, server
from tests.functional.soak import training_result
from tests.functional.stages import STAGES
from tests.functional.started import CHAIN, ROOT, Command
from tests.functional.tiny import write_inputs


pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not IS_BUILT, reason="no API server here: `make test-in ENV=k8s` builds it"),
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
    pytest.mark.filterwarnings("ignore:HTTPResponse.getheader:DeprecationWarning"),  # raised by the client
]


@pytest.fixture(scope="module")
def kubeconfig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with server(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture(scope="module", params=list(KINDS))
def definition(request: pytest.FixtureRequest, kubeconfig: Path) -> str:
    define(kubeconfig, request.param)
    return request.param


@pytest.fixture
def scheduler(definition: str, kubeconfig: Path, tmp_path: Path) -> KubernetesScheduler:
    stages = {stage: {"gpus_per_node": 8} for stage in ("pretrain", "dense_ct", "evaluate")}
    return KubernetesScheduler(executor(definition, tmp_path, kubeconfig=str(kubeconfig), stages=stages))


def _job(tmp_path: Path, **fields: Any) -> Job:
    return Job("pretrain", tmp_path / "demo", ("python", "-m", "nemo_upcycle.pipeline"), is_training=True, **fields)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_server_accepts_every_stage_of_every_recipe(
    recipe: str, scheduler: KubernetesScheduler, tmp_path: Path
) -> None:
    scheduler.check(jobs_of(recipe, tmp_path / recipe))


def test_the_server_refuses_a_misspelt_field(scheduler: KubernetesScheduler, kubeconfig: Path, tmp_path: Path) -> None:
    settings = scheduler.executor
    right = manifests.manifest(settings, _job(tmp_path), "misspelt")
    api = KubernetesApi(str(kubeconfig), "")
    wrong = copy.deepcopy(right)
    wrong["spec"]["runPolicies"] = {}
    with pytest.raises(UpcycleError, match=r'unknown field "spec\.runPolicies"'):
        api.create(resource_of(settings), wrong, dry_run=True)


def test_refuses_a_field_that_trainer_2_2_lacks(kubeconfig: Path, tmp_path: Path) -> None:
    define(kubeconfig, "trainjob-2.2")
    settings = executor("trainjob-2.3", tmp_path, kubeconfig=str(kubeconfig))
    with pytest.raises(UpcycleError, match="termination_grace_s=0"):
        KubernetesScheduler(settings).check([_job(tmp_path)])


def test_a_server_that_is_down_is_said_to_be(kubeconfig: Path, tmp_path: Path) -> None:
    gone = tmp_path / "kubeconfig"
    text = yaml.safe_load(kubeconfig.read_text())
    text["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    gone.write_text(yaml.safe_dump(text))
    with pytest.raises(UpcycleError, match=r"Kubernetes API server does not answer at https://127\.0\.0\.1:9"):
        KubernetesScheduler(executor("pytorchjob-1.9", tmp_path, kubeconfig=str(gone))).check([_job(tmp_path)])
    with pytest.raises(UpcycleError, match="Credentials for the Kubernetes cluster were not found"):
        KubernetesApi(str(tmp_path / "nothing"), "")


@pytest.fixture
def operator(kubeconfig: Path) -> Iterator[Operator]:
    """The stand-in that runs the commands of jobs. The server has the newest definition of jobs."""
    define(kubeconfig, "trainjob-2.3")
    thread = Operator(kubeconfig)
    thread.environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SLOW_S": "2.0"}
    thread.start()
    yield thread
    thread.stop()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("kubernetes"))


def _start(inputs: Path, kubeconfig: Path, name: str, *words: str) -> Command:
    script = inputs / "cluster.py"  # pods must see the script
    shutil.copy(CHAIN, script)
    executor = {"image": "tests", "claim": "runs", "mount_path": inputs, "python": sys.executable}
    executor |= {"kubeconfig": kubeconfig, "report_within_s": 60}
    settings = [f"run.executor.{name}={value}" for name, value in executor.items()]
    chain = ["--factory", f"tiny(inputs='{inputs}', dir='{inputs / name}', nodes=2)", "run.executor=kubernetes"]
    return Command(inputs / f"{name}.txt", script, *chain, *settings, *words, "--yes", PYTHONWARNINGS="ignore")


@pytest.mark.slow
def test_a_training_resumes_after_an_eviction(inputs: Path, kubeconfig: Path, operator: Operator) -> None:
    run, run_dir = _start(inputs, kubeconfig, "whole"), inputs / "whole"
    run.wait_for_lines(run_dir / "pretrain/metrics.jsonl", 3)
    operator.evict(read_json(run_dir / "jobs.json")["jobs"]["pretrain"])
    assert run.wait() == 0, run.text()
    assert all((run_dir / name / MARKER).is_file() for name in STAGES)
    assert "[pretrain] stopped" in run.text()
    assert run.text().count("[pretrain] submitted: ") == 2
    other = _start(inputs, kubeconfig, "undisturbed", "--until", "pretrain")
    assert other.wait() == 0, other.text()
    assert training_result(run_dir / "pretrain") == training_result(inputs / "undisturbed/pretrain")
