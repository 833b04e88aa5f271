"""Manifests of single stages: against published schemas, with the site's fields, and as each kind of job has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nemo_upcycle.pipeline.executors import manifests
from nemo_upcycle.pipeline.executors.jobs import Job
from tests.crds import KINDS, closed_schema, executor


def _job(tmp_path: Path, name: str = "pretrain", **fields: Any) -> Job:
    return Job(name, tmp_path / "demo", ("python", "-m", "nemo_upcycle.pipeline", name, str(tmp_path)), **fields)


@pytest.mark.parametrize("definition", KINDS)
def test_a_misspelt_field_does_not_fit_the_schema(definition: str, tmp_path: Path) -> None:
    document = manifests.manifest(executor(definition, tmp_path), _job(tmp_path), "a")
    document["spec"]["sppec"] = 1
    with pytest.raises(jsonschema.ValidationError, match="sppec"):
        jsonschema.validate(document, closed_schema(definition), jsonschema.Draft7Validator)


def test_a_pytorchjob_has_a_master_and_workers_and_restarts_only_trainings(tmp_path: Path) -> None:
    settings = executor("pytorchjob-1.9", tmp_path)
    spec = manifests.manifest(settings, _job(tmp_path, nodes=3, ranks_per_node=8, is_training=True), "a")["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: role["replicas"] for name, role in replicas.items()} == {"Master": 1, "Worker": 2}
    assert replicas["Worker"]["restartPolicy"] == "OnFailure"
    assert (spec["nprocPerNode"], spec["runPolicy"]["backoffLimit"]) == ("8", 3)
    export = manifests.manifest(settings, _job(tmp_path, "export"), "a")["spec"]
    assert export["runPolicy"]["backoffLimit"] == 0
    assert {name: role["restartPolicy"] for name, role in export["pytorchReplicaSpecs"].items()} == {"Master": "Never"}


def test_a_patch_carries_volumes_and_a_training_starts_torchrun(tmp_path: Path) -> None:
    document = manifests.manifest(executor("trainjob-2.3", tmp_path), _job(tmp_path, ranks_per_node=2), "a")
    (job,) = document["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {str(tmp_path), "/data", "/dev/shm"}
    assert "env" not in container, "Trainer refuses it there"
    command = document["spec"]["trainer"]["command"]
    assert command[5:10] == ["python", "-m", "torch.distributed.run", "--no-python", "python"]


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
    spec = _template(manifests.manifest(executor(definition, tmp_path, overrides=overrides), _job(tmp_path), "a"))[
        "spec"
    ]
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
