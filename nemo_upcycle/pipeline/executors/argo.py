"""Stages as one Workflow of Argo, for sites that chain in the cluster; only written, never submitted from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.pipeline.executors import manifests
from nemo_upcycle.pipeline.executors.base import Job


#: What Argo puts in, so that every start of the workflow has jobs of its own: seconds since 1970.
_STARTED = "{{workflow.creationTimestamp.s}}"
#: A job's conditions are a list, in which Argo finds one by its number only.
_MOST_CONDITIONS = 8
_SUCCEEDED = {
    "TrainJob": "status.jobsStatus.0.succeeded > 0",
    "PyTorchJob": "status.replicaStatuses.Master.succeeded > 0",
}


def name_of(job: Job) -> str:
    """Return the name of a stage's job, with what Argo fills in."""
    return f"{manifests.base_name(job)}-{_STARTED}"


def workflow(namespace: str, documents: Mapping[Job, dict[str, Any]]) -> str:
    """Return stages as a Workflow: `argo submit FILE` runs each when those before it have succeeded.

    Its service account needs rights to create and watch the jobs. A TrainJob's runtime must have one replicated job.

    Args:
        namespace: of the workflow.
        documents: the stages with their manifests; what they come after counts as far as it is among them.
    """
    names = {job.name: manifests.label_of(job.name) for job in documents}
    tasks = [
        {
            "name": names[job.name],
            "template": names[job.name],
            "dependencies": [names[before] for before in job.after if before in names],
        }
        for job in documents
    ]
    run_dir = next(iter(documents)).run_dir
    stages = [_template(job, document) for job, document in documents.items()]
    document = {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Workflow",
        "metadata": {"generateName": f"{manifests.label_of(run_dir.name)}-", "namespace": namespace},
        "spec": {"entrypoint": "stages", "templates": [{"name": "stages", "dag": {"tasks": tasks}}, *stages]},
    }
    return manifests.as_yaml(document)


def _template(job: Job, document: dict[str, Any]) -> dict[str, Any]:
    failed = ", ".join(f"status.conditions.{number}.type == Failed" for number in range(_MOST_CONDITIONS))
    resource = {
        "action": "create",
        "successCondition": _SUCCEEDED[document["kind"]],
        "failureCondition": failed,
        "manifest": manifests.as_yaml(document),
    }
    return {"name": manifests.label_of(job.name), "resource": resource}
