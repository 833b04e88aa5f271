"""The Kubernetes executor against a real API server and the published definitions: what it accepts, how jobs end.

What needs controllers, pods, claims or webhooks is not tried here.
"""

from __future__ import annotations

import copy
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
from tests.crds import KINDS, RECIPES, executor, jobs_of
from tests.functional.kubernetes_server import IS_BUILT, define, server


pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(not IS_BUILT, reason="no API server here: `make test-k8s` builds it"),
    pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning"),
    pytest.mark.filterwarnings("ignore:HTTPResponse.getheader:DeprecationWarning"),  # the client, of urllib3's names
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
    return KubernetesScheduler(executor(definition, tmp_path, kubeconfig=str(kubeconfig)))


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
    settings.tolerations = [{"key": "a", "operator": "Exists", "effects": "NoSchedule"}]
    with pytest.raises(UpcycleError, match=r"effects"):
        scheduler.check([_job(tmp_path)])


def test_a_field_that_trainer_2_2_lacks_is_refused_with_the_fix(kubeconfig: Path, tmp_path: Path) -> None:
    define(kubeconfig, "trainjob-2.2")
    settings = executor("trainjob-2.3", tmp_path, kubeconfig=str(kubeconfig))
    with pytest.raises(UpcycleError, match="termination_grace_s=0"):
        KubernetesScheduler(settings).check([_job(tmp_path)])


def test_a_server_that_is_down_is_said_to_be(kubeconfig: Path, tmp_path: Path) -> None:
    gone = tmp_path / "kubeconfig"
    text = yaml.safe_load(kubeconfig.read_text())
    text["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    gone.write_text(yaml.safe_dump(text))
    with pytest.raises(UpcycleError, match=r"Kubernetes API server: got none from https://127\.0\.0\.1:9"):
        KubernetesScheduler(executor("pytorchjob-1.9", tmp_path, kubeconfig=str(gone))).check([_job(tmp_path)])
    with pytest.raises(UpcycleError, match="credentials of the Kubernetes cluster"):
        KubernetesApi(str(tmp_path / "nothing"), "")
