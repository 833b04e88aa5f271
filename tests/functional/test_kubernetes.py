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
from nemo_upcycle.pipeline.executors.jobs import Job, JobState, Phase
from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
from nemo_upcycle.pipeline.executors.kubernetes_api import KubernetesApi
from nemo_upcycle.pipeline.executors.kubernetes_settings import Resource, resource_of
from tests.crds import KINDS, RECIPES, executor, jobs_of
from tests.functional.kubernetes_server import IS_BUILT, define, server, wait_for


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


def test_a_check_creates_nothing(scheduler: KubernetesScheduler, tmp_path: Path) -> None:
    scheduler.check([_job(tmp_path)])
    (name,) = scheduler.render(_job(tmp_path))
    identity = name.removesuffix(".yaml")
    assert scheduler.states([identity]) == {identity: JobState(Phase.ENDED, "deleted")}
    assert not (tmp_path / "demo").exists()


def _report(scheduler: KubernetesScheduler, identity: str, *conditions: str) -> None:
    """Say of a job what a controller would."""
    from kubernetes import client, config

    resource = resource_of(scheduler.executor)
    entries = [
        {
            "type": name,
            "status": "True",
            "reason": "Tried",
            "message": f"it is {name}",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
        for name in conditions
    ]
    objects = client.CustomObjectsApi(config.new_client_from_config(scheduler.executor.kubeconfig))
    address = (resource.group, resource.version, scheduler.executor.namespace, resource.plural, identity)
    status = {"conditions": entries, **({"replicaStatuses": {}} if resource.kind == "PyTorchJob" else {})}
    objects.patch_namespaced_custom_object_status(*address, {"status": status})


def test_jobs_end_with_a_reason_when_they_fail_are_deleted_or_nobody_answers(
    scheduler: KubernetesScheduler, tmp_path: Path
) -> None:
    scheduler.executor.report_within_s = 3  # below what `check` lets pass
    done = "Succeeded" if scheduler.executor.kind == "pytorchjob" else "Complete"
    ids = [scheduler.submit(_job(tmp_path / name), []) for name in ("failed", "complete", "deleted", "silent")]
    failed, complete, deleted, silent = ids
    assert len(set(ids)) == 4
    assert {state.phase for state in scheduler.states(ids).values()} == {Phase.WAITING}
    _report(scheduler, failed, "Failed")
    _report(scheduler, complete, done)
    scheduler.cancel([deleted, deleted])

    def ended() -> Any:
        states = scheduler.states(ids)
        return states if all(state.phase is Phase.ENDED for state in states.values()) else None

    states = wait_for(ended)
    assert states[failed].reason == "Tried: it is Failed"
    assert states[complete].reason == f"Tried: it is {done}"
    assert states[deleted].reason == "deleted"
    assert "no controller has reported on it for 3 s" in states[silent].reason
    assert (
        yaml.safe_load((_job(tmp_path / "failed").folder / f"{failed}.yaml").read_text())["metadata"]["name"] == failed
    )


def test_a_field_that_trainer_2_2_lacks_is_refused_with_the_fix(kubeconfig: Path, tmp_path: Path) -> None:
    define(kubeconfig, "trainjob-2.2")
    settings = executor("trainjob-2.3", tmp_path, kubeconfig=str(kubeconfig))
    with pytest.raises(UpcycleError, match="termination_grace_s=0"):
        KubernetesScheduler(settings).check([_job(tmp_path)])


def test_a_cluster_without_the_operator_is_refused(kubeconfig: Path, tmp_path: Path) -> None:
    settings = executor("pytorchjob-1.9", tmp_path, kubeconfig=str(kubeconfig))
    resource = resource_of(settings)
    unknown = Resource("nowhere.org", *(resource.version, resource.plural, resource.kind, "", "It", {}))
    with pytest.raises(UpcycleError, match=r"pytorchjobs\.nowhere\.org: got not known to the cluster"):
        KubernetesApi(str(kubeconfig), "").create(unknown, manifests.manifest(settings, _job(tmp_path), "a"))


def test_a_server_that_is_down_is_said_to_be(kubeconfig: Path, tmp_path: Path) -> None:
    gone = tmp_path / "kubeconfig"
    text = yaml.safe_load(kubeconfig.read_text())
    text["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    gone.write_text(yaml.safe_dump(text))
    with pytest.raises(UpcycleError, match=r"Kubernetes API server: got none from https://127\.0\.0\.1:9"):
        KubernetesScheduler(executor("pytorchjob-1.9", tmp_path, kubeconfig=str(gone))).check([_job(tmp_path)])
    with pytest.raises(UpcycleError, match="credentials of the Kubernetes cluster"):
        KubernetesApi(str(tmp_path / "nothing"), "")
