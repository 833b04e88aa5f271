"""Kubernetes without a cluster: manifests against published schemas, names, refusals and job states."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import kubernetes, manifests
from nemo_upcycle.pipeline.executors.base import UnreachableError
from nemo_upcycle.pipeline.executors.jobs import Job, JobState, Phase
from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
from nemo_upcycle.pipeline.executors.kubernetes_api import TakenError, reported_state
from nemo_upcycle.trainers.facts import Profile
from tests.crds import KINDS, RECIPES, closed_schema, executor, jobs_of
from tests.tiers import quick


class FakeApi:
    """An API server that keeps its objects in a dictionary."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.answers = True
        self.why = ""
        self.lacks = ""

    def create(self, resource: Any, manifest: dict[str, Any], *, dry_run: bool = False) -> None:
        if not self.answers:
            raise UnreachableError("Kubernetes API server: nothing")
        if manifest["metadata"]["name"] in self.jobs:
            raise TakenError
        if not dry_run:
            self.jobs[manifest["metadata"]["name"]] = manifest

    def get(self, resource: Any, namespace: str, name: str) -> dict[str, Any] | None:
        if not self.answers:
            raise UnreachableError("Kubernetes API server: nothing")
        return self.jobs.get(name)

    def delete(self, resource: Any, namespace: str, name: str) -> None:
        self.jobs.pop(name, None)

    def lacks_claim(self, namespace: str, name: str) -> bool:
        return name == self.lacks

    lacks_queue = lacks_claim

    def why_pods_wait(self, namespace: str, selector: str) -> str:
        return self.why


def _job(tmp_path: Path, name: str = "pretrain", **fields: Any) -> Job:
    return Job(name, tmp_path / "demo", ("python", "-m", "nemo_upcycle.pipeline", name, str(tmp_path)), **fields)


def _scheduler(tmp_path: Path, definition: str = "trainjob-2.3", **fields: Any) -> tuple[KubernetesScheduler, FakeApi]:
    api = FakeApi()
    return KubernetesScheduler(executor(definition, tmp_path, **fields), api), api  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", quick(RECIPES, "llama3_8b_e8t2", "smollm2_135m_e8t2"))
def test_every_stage_of_every_recipe_fits_the_published_schemas(recipe: str, tmp_path: Path) -> None:
    jobs = jobs_of(recipe, tmp_path / "demo")
    for definition in KINDS:
        scheduler, _ = _scheduler(tmp_path, definition)
        schema = jsonschema.Draft7Validator(closed_schema(definition))
        for job in jobs:
            ((name, text),) = scheduler.render(job).items()
            document = yaml.safe_load(text)
            schema.validate(document)
            assert not schema.is_valid(document | {"spec": document["spec"] | {"misspelt": 1}})
            assert name == f"{document['metadata']['name']}.yaml"


def test_names_are_labels_whatever_the_folder_is_called(tmp_path: Path) -> None:
    for folder in ("8B Läufe_v2", "ÄÖ", "x" * 90, "demo-"):
        name = manifests.base_name(dataclasses.replace(_job(tmp_path, "dense_ct"), run_dir=tmp_path / folder))
        assert re.fullmatch("[A-Za-z][A-Za-z0-9-]*", name)
        assert len(f"{name}-20-worker-999") < 64


def test_a_linked_mount_keeps_its_name_in_the_pods(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    mount = tmp_path / "runs"
    mount.symlink_to(tmp_path / "real")
    scheduler, _ = _scheduler(mount)
    scheduler.check([_job(mount)])
    (text,) = scheduler.render(_job(mount)).values()
    assert f"{mount}/demo/jobs/pretrain/" in text


def test_a_rerun_takes_another_name_in_the_cluster(tmp_path: Path) -> None:
    scheduler, api = _scheduler(tmp_path)
    job = _job(tmp_path)
    first = scheduler.submit(job, [])
    (job.folder / f"{first}.yaml").rename(tmp_path / "elsewhere.yaml")
    scheduler.check([job])
    second = scheduler.submit(job, [])
    assert scheduler.submit(job, []) == second, "an answer that was lost does not start it twice"
    api.jobs[second] = _status("Failed")
    third = scheduler.submit(job, [])
    assert [first[-2:], second[-2:], third[-2:]] == ["-1", "-2", "-3"]
    assert set(api.jobs) == {first, second, third}
    assert scheduler.logs(dataclasses.replace(job, nodes=2), third)[1] == job.folder / f"{third}-node1.log"


STAGE = "run.executor.stages.pretrain"


@pytest.mark.parametrize(
    ("fields", "subject", "got"),
    [
        ({"image": "???"}, "run.executor.image", "is missing"),
        ({"mount_path": "/elsewhere"}, "Folder DIR", "is not visible in the pods, which mount /elsewhere and /data"),
        ({"kind": "trainjob-2.1"}, "run.executor.kind", "trainjob-2.1"),
        ({"restarts": 3}, "run.executor.restarts", "is 3, but a job of kind trainjob has no field for this setting"),
        ({"stages": {"pretrain": {"gpu_per_node": 8}}}, f"{STAGE}: key", "gpu_per_node"),
        (
            {"stages": {"pretrain": {"namespace": "other"}}},
            f"{STAGE}.namespace",
            "is other, but this setting must be the same for all stages",
        ),
        ({"gpus_per_node": 4}, f"{STAGE}.gpus_per_node", 4),
        ({"gpus_per_node": 0}, f"{STAGE}.gpus_per_node", 0),
        ({"shared_memory_gib": 64}, f"{STAGE}.shared_memory_gib", 64),
        ({"secret_env_vars": {"HF_TOKEN": "hub/"}}, "run.executor.secret_env_vars.HF_TOKEN", "'hub/'"),
        ({"env_vars": {"A-B": "1"}}, "run.executor.env_vars", "'A-B'"),
        ({"run_as": "me"}, "run.executor.run_as", "me"),
        ({"tolerations": [{"key": "a", "operator_": "Exists"}]}, "run.executor.tolerations", "operator_"),
        ({"tolerations": [{"key": "a", "operator": "Exist"}]}, "run.executor.tolerations.operator", "Exist"),
        ({"report_within_s": 40}, "run.executor.report_within_s", 40),
        ({"performance": {"NCCL_NVLS_ENABEL": None}}, "run.executor.performance", "NCCL_NVLS_ENABEL"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(
    fields: dict[str, Any], subject: str, got: object, tmp_path: Path
) -> None:
    scheduler, _ = _scheduler(tmp_path, **{"stages": {}, "gpus_per_node": 8, **fields})
    job = _job(tmp_path, ranks_per_node=8, is_training=True, gpus=8)
    with pytest.raises(UpcycleError) as refused:
        scheduler.check([job])
    assert (refused.value.subject, refused.value.got) == (subject.replace("DIR", str(job.run_dir)), got)


def test_pods_run_as_who_launches_or_who_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 501)
    monkeypatch.setattr(os, "getgid", lambda: 20)

    def pod(run_as: str | None) -> tuple[Any, list[str]]:
        scheduler, _ = _scheduler(tmp_path, kind="pytorchjob", run_as=run_as)
        (text,) = scheduler.render(_job(tmp_path)).values()
        spec = yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
        homes = [one["value"] for one in spec["containers"][0]["env"] if one["name"] == "HOME"]
        return spec.get("securityContext"), homes

    mine, homes = pod(None)
    assert (mine["runAsNonRoot"], mine["runAsUser"], mine["fsGroup"], homes) == (True, 501, 20, ["/tmp"])
    root, homes = pod("0:0")
    assert (root["runAsNonRoot"], root["fsGroup"], homes) == (False, 0, [])
    assert pod("") == (None, [])


def test_training_pods_get_the_sites_performance_settings(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"env_vars": {"NCCL_NVLS_ENABLE": "1", "TORCH_NCCL_HIGH_PRIORITY": None}}
    fields |= {"performance": {"TOKENIZERS_PARALLELISM": None, "CUDA_DEVICE_MAX_CONNECTIONS": 8}}
    fields |= {"secret_env_vars": {"NVTE_FWD_LAYERNORM_SM_MARGIN": "sms/forward"}}
    scheduler, _ = _scheduler(tmp_path, **fields)
    profile = Profile(accelerator="gpu", tp=2, ep=8, dispatcher="alltoall")
    job = _job(tmp_path, ranks_per_node=8, is_training=True, profile=profile)
    (text,) = scheduler.render(job).values()
    found = [(entry["name"], entry.get("value")) for entry in yaml.safe_load(text)["spec"]["trainer"]["env"]]
    values = dict(found)
    assert len(found) == len(values), "a name twice"
    wanted = {"NCCL_NVLS_ENABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "8", "NVTE_BWD_LAYERNORM_SM_MARGIN": "16"}
    assert values.items() >= (wanted | {"NVTE_FWD_LAYERNORM_SM_MARGIN": None}).items(), "the last is a secret's"
    assert not {"TORCH_NCCL_HIGH_PRIORITY", "TOKENIZERS_PARALLELISM"} & set(values)
    (other,) = scheduler.render(_job(tmp_path, "import")).values()
    assert "NVTE_BWD" not in other


@pytest.mark.parametrize("lacking", ["runs", "datasets", "gpus"])
def test_a_claim_or_queue_that_the_cluster_lacks_is_refused(lacking: str, tmp_path: Path) -> None:
    scheduler, api = _scheduler(tmp_path)
    api.lacks = lacking
    with pytest.raises(UpcycleError, match=f" {lacking} does not exist in namespace"):
        scheduler.check([_job(tmp_path)])


#: The controllers of a suspended job do not count as silent, however long the job is suspended.
SUSPENDED = JobState(Phase.WAITING, "suspended: its queue has not admitted it, or an administrator holds it")


def _status(*conditions: str, **fields: Any) -> dict[str, Any]:
    true = [{"type": name, "status": "True", "reason": "Because", "message": "of this"} for name in conditions]
    return {"status": {"conditions": true, **fields}}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({}, None),
        (_status("Complete"), JobState(Phase.ENDED, "Because: of this")),
        (_status("Suspended", "Failed"), JobState(Phase.ENDED, "Because: of this")),
        (_status("Created", "Succeeded"), JobState(Phase.ENDED, "Because: of this")),
        (_status("Created", "Running"), JobState(Phase.RUNNING)),
        (_status("Created", "Restarting"), JobState(Phase.WAITING, "Because: of this")),
        *(({"spec": spec}, SUSPENDED) for spec in ({"suspend": True}, {"runPolicy": {"suspend": True}})),
        ({"status": {"jobsStatus": [{"name": "node", "active": 1, "ready": 0}]}}, JobState(Phase.WAITING)),
        ({"status": {"jobsStatus": [{"name": "node", "active": 1, "ready": 1}]}}, JobState(Phase.RUNNING)),
    ],
)
def test_states_are_what_the_controllers_report(found: dict[str, Any], expected: JobState | None) -> None:
    assert reported_state(found) == expected


def test_deleted_and_silent_jobs_have_ended_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(kubernetes, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    scheduler, _ = _scheduler(tmp_path, report_within_s=60)
    identity = scheduler.submit(_job(tmp_path), [])
    assert scheduler.states([identity])[identity].phase is Phase.WAITING
    now_s[0] += 61
    assert scheduler.states([identity])[identity].phase is Phase.ENDED
    scheduler.cancel([identity, "never-was"])
    assert scheduler.states([identity])[identity] == JobState(Phase.ENDED, "deleted")


def test_a_waiting_job_says_what_its_pods_wait_for(tmp_path: Path) -> None:
    scheduler, api = _scheduler(tmp_path)
    api.jobs["a"], api.why = _status("Created"), "no such image"
    assert scheduler.states(["a"])["a"] == JobState(Phase.WAITING, "no such image")


def test_a_server_that_does_not_answer_ends_nothing_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, api = _scheduler(tmp_path)
    monkeypatch.setattr("nemo_upcycle.pipeline.executors.kubernetes.KubernetesApi", lambda *_: api)
    api.jobs["a"] = _status("Running")
    assert scheduler.states(["a"])["a"].phase is Phase.RUNNING
    api.answers = False
    state = scheduler.states(["a"])["a"]
    assert (state.phase, "Kubernetes API server" in state.reason) == (Phase.RUNNING, True)
    with pytest.raises(UpcycleError, match="Kubernetes API server"):
        scheduler.check([_job(tmp_path)])


def test_kept_manifest_with_a_secret_is_its_owners_alone(tmp_path: Path) -> None:
    for number, variables in enumerate(({"HF_TOKEN": "hf_abc"}, {"HF_HOME": "/hf"}), 1):
        scheduler, _ = _scheduler(tmp_path, "trainjob-2.3", env_vars=variables)
        job = _job(tmp_path)
        path = job.folder / f"{scheduler.submit(job)}.yaml"
        assert next(iter(variables.values())) in path.read_text()
        assert (path.stat().st_mode & 0o077 == 0) is (number == 1)
        assert "hf_abc" not in "".join(scheduler.masked().render(job).values())


def test_a_pytorchjob_restarts_only_trainings(tmp_path: Path) -> None:
    settings = executor("pytorchjob-1.9", tmp_path)
    spec = manifests.manifest(settings, _job(tmp_path, nodes=3, ranks_per_node=8, is_training=True), "a")["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: role["replicas"] for name, role in replicas.items()} == {"Master": 1, "Worker": 2}
    assert replicas["Worker"]["restartPolicy"] == "OnFailure"
    assert (spec["nprocPerNode"], spec["runPolicy"]["backoffLimit"]) == ("8", 3)
    export = manifests.manifest(settings, _job(tmp_path, "export"), "a")["spec"]
    assert export["runPolicy"]["backoffLimit"] == 0
    assert {name: role["restartPolicy"] for name, role in export["pytorchReplicaSpecs"].items()} == {"Master": "Never"}


@pytest.mark.parametrize("definition", KINDS)
def test_labels_and_annotations_are_the_jobs_and_its_pods(definition: str, tmp_path: Path) -> None:
    document = manifests.manifest(executor(definition, tmp_path), _job(tmp_path), "a")
    found = [document["metadata"], _template(document)["metadata"]]
    assert [(one["labels"]["team"], one["annotations"]) for one in found] == [("llm", {"note": "a test"})] * 2


@pytest.mark.parametrize("definition", KINDS)
def test_overrides_are_merged_into_the_pod_and_win(definition: str, tmp_path: Path) -> None:
    name = "pytorch" if definition == "pytorchjob-1.9" else "node"
    overrides = {
        "containers": [{"name": name, "volumeMounts": [{"name": "shared-memory", "mountPath": "/shm"}]}],
        "nodeSelector": {"rack": "a", "pool": None},
        "serviceAccountName": None,
    }
    document = manifests.manifest(executor(definition, tmp_path, overrides=overrides), _job(tmp_path), "a")
    spec = _template(document)["spec"]
    (container,) = spec["containers"]
    assert [mount["mountPath"] for mount in container["volumeMounts"]] == [str(tmp_path), "/data", "/shm"]
    assert spec["nodeSelector"] == {"rack": "a"}
    assert "serviceAccountName" not in spec


def _template(document: dict[str, Any]) -> dict[str, Any]:
    spec = document["spec"]
    if "pytorchReplicaSpecs" in spec:
        return spec["pytorchReplicaSpecs"]["Master"]["template"]
    patch = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]
    return patch["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
