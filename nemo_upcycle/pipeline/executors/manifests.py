"""Make the manifest of a stage: a Kubeflow TrainJob or PyTorchJob.

This module turns settings and jobs into plain values. It needs neither a cluster nor a client.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import hub_variables
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.kubernetes_settings import (
    KubernetesExecutor,
    NodeResources,
    PodSettings,
    resource_of,
)


#: Name of a runtime patch's author; the name must look like a label with a domain.
MANAGER = "nemo-upcycle/launcher"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
#: In Kubeflow's torch runtimes, this is the name of the replicated job that runs the ranks, and of the job's
#: container.
_NODE = "node"
#: Largest number of characters that the run's name, or the stage's name, has in a job's name. Pods are called
#: NAME-node-0-NUMBER or NAME-worker-NUMBER, and a pod's name must stay below 64 characters.
_RUN_CHARS = 20

# Bash is the pod's first process. Bash also writes the ranks' output to the run's folder, and passes SIGTERM on.
# torchrun would kill its ranks 30 s after a SIGTERM, in the middle of a checkpoint. So bash sends the signal to
# torchrun's ranks. Torchrun gets no signal, and waits for its ranks.
_WRAPPER = """\
log=$1-node${PET_NODE_RANK:-0}.log; shift
mkdir -p "$(dirname "$log")"
exec > >(exec tee -a "$log") 2>&1
"$@" &
child=$!
trap 'kill -TERM %s' TERM
wait $child; status=$?
while kill -0 $child 2>/dev/null; do wait $child; status=$?; done
sleep 1
exit $status
"""
_TERM_TO_RANKS = _WRAPPER % "$(cat /proc/$child/task/$child/children)"
_TERM_TO_CHILD = _WRAPPER % "$child"


def pod_path(path: Path) -> Path:
    """Make a path absolute without resolving links, because pods do not have this machine's links."""
    return Path(os.path.abspath(path))


def label_of(text: str) -> str:
    """Return a text in the form of the cluster's names: small letters, digits and hyphens; a letter is first.

    Example:
        >>> label_of("8B v2")
        'run-8b-v2'
    """
    label = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    label = label if label[:1].isalpha() else f"run-{label}"
    return label[:_RUN_CHARS].strip("-")


def base_name(job: Job) -> str:
    """Make the prefix of a stage's job names: the run's folder, the stage, and a hash of the folder's path.

    Example:
        >>> base_name(Job("dense_ct", Path("/runs/demo"), ()))
        'demo-dense-ct-d3017f'
    """
    run_dir = pod_path(job.run_dir)
    digest = hashlib.sha256(str(run_dir).encode()).hexdigest()[:6]
    return f"{label_of(run_dir.name)}-{label_of(job.name)}-{digest}"


def manifest(
    settings: KubernetesExecutor, job: Job, name: str, variables: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Make the manifest of a stage.

    Args:
        settings: executor settings of this stage.
        job: job of the stage.
        name: name of the job in the cluster.
        variables: variables of the pods, in addition to the site's own.

    Raises:
        UpcycleError: the settings do not fit the kind of job.
    """
    resource = resource_of(settings)
    for lacking, instead in resource.lacks.items():
        if value := getattr(settings, lacking):
            fix = f"set run.executor.{lacking} to {type(value)()!r}, and set {instead} instead"
            raise UpcycleError(
                f"run.executor.{lacking}",
                kind="refused",
                got=f"is {value}, but a job of kind {settings.kind} has no field for this setting",
                fix=fix,
            )
    labels = {"app.kubernetes.io/name": "nemo-upcycle", "nemo-upcycle/stage": job.name}
    labels |= {QUEUE_LABEL: settings.queue} if settings.queue else {}
    metadata = {"labels": labels | settings.labels, **_given(annotations=settings.annotations)}
    render = _pytorchjob_spec if resource.kind == "PyTorchJob" else _trainjob_spec
    return {
        "apiVersion": f"{resource.group}/{resource.version}",
        "kind": resource.kind,
        "metadata": {"name": name, "namespace": settings.namespace, **metadata},
        "spec": render(settings, job, name, variables or {}),
    }


def _trainjob_spec(settings: KubernetesExecutor, job: Job, name: str, fast: Mapping[str, str]) -> dict[str, Any]:
    kind, _, runtime = settings.runtime.rpartition("/")
    template = {"spec": {"template": _pod(settings, {"name": _NODE})}}
    patch = {"template": {"spec": {"replicatedJobs": [{"name": _NODE, "template": template}]}}}
    return {
        "runtimeRef": {"name": runtime} | ({"kind": kind} if kind else {}),
        "trainer": {
            "image": settings.image,
            "command": _command(settings, job, name),
            "env": _environment(settings, job, fast),
            "numNodes": job.nodes,
            "numProcPerNode": job.ranks_per_node,
            "resourcesPerNode": _resources(settings),
        },
        "runtimePatches": [{"manager": MANAGER, "trainingRuntimeSpec": patch}],
        **_given(activeDeadlineSeconds=settings.active_deadline_s),
    }


def _pytorchjob_spec(settings: KubernetesExecutor, job: Job, name: str, fast: Mapping[str, str]) -> dict[str, Any]:
    container = {
        "name": "pytorch",
        "image": settings.image,
        "command": _command(settings, job, name),
        "env": _environment(settings, job, fast),
        "resources": _resources(settings),
        **_given(imagePullPolicy=settings.image_pull_policy),
    }
    restarts = settings.restarts if job.is_training else 0

    def replicas(number: int) -> dict[str, Any]:
        # The policy ExitCode would treat status 1 as final, but torchrun always ends with 1 if its ranks fail.
        policy = "OnFailure" if restarts else "Never"
        return {"replicas": number, "restartPolicy": policy, "template": _pod(settings, container)}

    deadline = _given(activeDeadlineSeconds=settings.active_deadline_s)
    return {
        "nprocPerNode": str(job.ranks_per_node),
        "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": restarts, **deadline},
        "pytorchReplicaSpecs": {
            "Master": replicas(1),
            **({"Worker": replicas(job.nodes - 1)} if job.nodes > 1 else {}),
        },
    }


def _pod(settings: KubernetesExecutor, container: dict[str, Any]) -> dict[str, Any]:
    """Return the pod template with one container. A patch of a runtime has the same fields."""
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    for number, (claim, path) in enumerate(settings.mounts.items()):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{number}", "mountPath": path})
    if settings.shared_memory_gib:
        limit = {"medium": "Memory", "sizeLimit": f"{settings.shared_memory_gib}Gi"}
        volumes.append({"name": "shared-memory", "emptyDir": limit})
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
    spec = {
        "containers": [{**container, "volumeMounts": mounts, **_given(securityContext=settings.security_context)}],
        "volumes": volumes,
        **_given(
            securityContext=_pod_security(settings),
            affinity=settings.affinity,
            priorityClassName=settings.priority_class,
            tolerations=settings.tolerations,
            nodeSelector=settings.node_selector,
            imagePullSecrets=[{"name": secret} for secret in settings.pull_secrets],
            serviceAccountName=settings.service_account,
            terminationGracePeriodSeconds=settings.termination_grace_s,
        ),
    }
    metadata = _given(labels=settings.labels, annotations=settings.annotations)
    return {**_given(metadata=metadata), "spec": merged(spec, settings.overrides)}


def _pod_security(settings: PodSettings) -> dict[str, Any]:
    """Return the security context with the user of the pods; empty if the image or the cluster decides."""
    if settings.user is None:
        return {}
    user, group = settings.user
    owner = {"runAsUser": user, "runAsGroup": group, "fsGroup": group, "fsGroupChangePolicy": "OnRootMismatch"}
    return {"runAsNonRoot": user != 0, **owner}


def merged(base: Any, changes: Any) -> Any:
    """Merge changes into a value: mappings key by key, lists of named entries by name; replace anything else.

    Example:
        >>> merged({"a": [{"name": "x", "b": 1}], "c": 2}, {"a": [{"name": "x", "d": 3}], "c": None})
        {'a': [{'name': 'x', 'b': 1, 'd': 3}]}
    """
    if isinstance(base, dict) and isinstance(changes, dict):
        changed = {name: merged(base.get(name), value) for name, value in changes.items()}
        return {name: value for name, value in {**base, **changed}.items() if name not in changes or value is not None}
    if _are_named(base) and _are_named(changes):
        by_name = {entry["name"]: entry for entry in base}
        return list(merged(by_name, {entry["name"]: entry for entry in changes}).values())
    return changes


def _are_named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) and "name" in entry for entry in value)


def _command(settings: KubernetesExecutor, job: Job, name: str) -> list[str]:
    """Write the command of a pod: the job's own command with the image's Python, once per rank.

    torchrun takes nodes, ranks and the first node's address from the variables PET_*, which the operators set.
    """
    command = [settings.python, *job.command[1:]]
    has_ranks = job.nodes * job.ranks_per_node > 1
    if has_ranks:
        command = [settings.python, "-m", "torch.distributed.run", "--no-python", *command]
    script = _TERM_TO_RANKS if has_ranks else _TERM_TO_CHILD
    return ["bash", "-c", script, "nemo-upcycle", str(pod_path(job.folder) / name), *command]


def _environment(settings: KubernetesExecutor, job: Job, fast: Mapping[str, str]) -> list[dict[str, Any]]:
    set_by_site = {**settings.env_vars, **settings.secret_env_vars}
    # A user unknown to the image has no home, and libraries ask for the user's name.
    home = {"HOME": "/tmp", "USER": "nemo-upcycle"} if _pod_security(settings).get("runAsUser") else {}
    plain = {"PYTHONUNBUFFERED": "1", **home, **hub_variables(job, set_by_site), **fast, **settings.env_vars}
    given = {name: value for name, value in plain.items() if value is not None}
    variables: list[dict[str, Any]] = [{"name": name, "value": str(value)} for name, value in given.items()]
    for name, source in settings.secret_env_vars.items():
        secret, _, key = source.partition("/")
        variables.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key or name}}})
    return variables


def _resources(settings: NodeResources) -> dict[str, Any]:
    asked: dict[str, Any] = _given(cpu=settings.cpus)
    asked |= {"memory": f"{settings.memory_gib}Gi"} if settings.memory_gib else {}
    asked |= {settings.gpu_resource: settings.gpus_per_node} if settings.gpus_per_node else {}
    asked |= settings.extra_resources
    return {"requests": asked, "limits": dict(asked)} if asked else {}


def _given(**fields: Any) -> dict[str, Any]:
    """Return the fields that are set: neither 0 nor empty."""
    return {name: value for name, value in fields.items() if value}
