"""Settings of stages on Kubernetes, and the kinds of jobs there."""

# Do not postpone annotations in this module, and write Optional[...]: NeMo-Run reads them to parse the executor's
# fields.

import os
import re
from dataclasses import dataclass, field
from typing import Any, Optional

import nemo_run as run

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import MISSING
from nemo_upcycle.pipeline.executors.site import SiteSettings


@dataclass(kw_only=True)
class NodeResources:
    """Resources of a node. If a resource is 0, the cluster or the runtime decides.

    Args:
        cpus: CPUs.
        memory_gib: memory (GiB).
        gpus_per_node: GPUs.
        gpu_resource: the cluster's name for GPUs.
        extra_resources: further resources, such as `{"rdma/ib": 8}`.
        shared_memory_gib: size of /dev/shm (GiB), which training needs and which counts as memory.
    """

    cpus: int = 0
    memory_gib: int = 0
    gpus_per_node: int = 0
    gpu_resource: str = "nvidia.com/gpu"
    extra_resources: dict[str, int] = field(default_factory=dict)
    shared_memory_gib: int = 0


@dataclass(kw_only=True)
class PodSettings:
    """The pods of a job: image, volumes, placement, user and secrets. An empty text omits its field.

    Args:
        image: image of the containers; it must have this package, torch, bash and tee.
        image_pull_policy: `Always`, `IfNotPresent` or `Never` (PyTorchJob).
        pull_secrets: names of the secrets for pulling the image.
        python: Python interpreter of the image.
        claim: PersistentVolumeClaim (ReadWriteMany) that holds the runs.
        mount_path: mount path of the claim, in the pods and on the launching machine.
        volumes: mount path of each further claim.
        tolerations: tolerations of the pods.
        node_selector: node selector of the pods.
        affinity: affinity of the pods.
        priority_class: priority class of the pods (PyTorchJob; with Kueue set the label
            `kueue.x-k8s.io/priority-class`).
        service_account: service account of the pods.
        run_as: `UID:GID` of the pods; the pods' group owns new files on the claims. If None, the pods run as the user
            and group of the launching process, which owns the run's folder. If empty, the image or the cluster
            decides.
        security_context: security context of the container, such as `{capabilities: {add: [IPC_LOCK]}}` for
            InfiniBand.
        secret_env_vars: place of each variable's value, as in `{"HF_TOKEN": "SECRET/KEY"}`.
        overrides: further fields of a pod's spec, merged last: mappings key by key, lists of named entries by name,
            other lists as a whole; None removes a field. A TrainJob takes only some of a pod's fields.
    """

    image: str = MISSING
    image_pull_policy: str = ""
    pull_secrets: list[str] = field(default_factory=list)
    python: str = "python"
    claim: str = MISSING
    mount_path: str = MISSING
    volumes: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    node_selector: dict[str, str] = field(default_factory=dict)
    affinity: dict[str, Any] = field(default_factory=dict)
    priority_class: str = ""
    service_account: str = ""
    run_as: Optional[str] = None  # noqa: UP045
    security_context: dict[str, Any] = field(default_factory=dict)
    secret_env_vars: dict[str, str] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def mounts(self) -> dict[str, str]:
        """Mount path of each claim of the pods."""
        return {self.claim: self.mount_path, **self.volumes}

    @property
    def user(self) -> tuple[int, int] | None:
        """User and group of the pods; None if the image or the cluster decides."""
        named = f"{os.getuid()}:{os.getgid()}" if self.run_as is None else self.run_as
        if not named:
            return None
        if not re.fullmatch(r"\d+:\d+", named, re.ASCII):
            raise UpcycleError(
                "run.executor.run_as", got=named, expected="UID:GID", fix="write the numbers of `id -u` and `id -g`"
            )
        user, _, group = named.partition(":")
        return int(user), int(group)


@dataclass(kw_only=True)
class JobSettings:
    """The jobs, their controllers and time limits. If a setting is 0 or empty, the cluster or runtime decides.

    Args:
        namespace: namespace of the jobs.
        kind: kind of the jobs: `trainjob` (Kubeflow Trainer 2.2 and later) or `pytorchjob` (training operator 1.9).
        runtime: ClusterTrainingRuntime of a TrainJob; `TrainingRuntime/NAME` for a runtime of the namespace.
        queue: LocalQueue of Kueue.
        labels: labels of the jobs and their pods.
        annotations: annotations of the jobs and their pods.
        termination_grace_s: seconds that evicted ranks have to save a checkpoint (Trainer 2.3 and later, PyTorchJob).
        active_deadline_s: seconds after which a job is ended.
        restarts: number of restarts from the last checkpoint before a training counts as failed (PyTorchJob only; the
            runtime of a TrainJob sets this number).
        report_within_s: seconds after which a job counts as ended if no controller reports on it. If an operator's
            node is lost, the operator starts elsewhere after 5 minutes.
        kubeconfig: path of the kubeconfig; if empty, $KUBECONFIG, ~/.kube/config or the pod's service account.
        context: context in the kubeconfig; if empty, the current context.
    """

    namespace: str = "default"
    kind: str = "trainjob"
    runtime: str = "torch-distributed"
    queue: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    termination_grace_s: int = 0
    active_deadline_s: int = 0
    restarts: int = 0
    report_within_s: int = 600
    kubeconfig: str = ""
    context: str = ""


@dataclass(kw_only=True)
class KubernetesExecutor(PodSettings, NodeResources, JobSettings, SiteSettings, run.Executor):
    """The executor for Kubernetes: where and how its stages run.

    NeMo-Run's own `KubeflowExecutor` is not used, for four reasons. Constructing `KubeflowExecutor` needs a
    kubeconfig, even for a dry run. `KubeflowExecutor` writes `podTemplateOverrides`, which Trainer 2.2 and later drop
    silently, and with this field the volumes, tolerations and pull secrets. `KubeflowExecutor` starts the next stage
    even if a stage has failed. `KubeflowExecutor` waits forever for a job that was deleted. The executor here copies
    nothing into the pods, because the plan of a run is in the run's folder, on a claim that the pods mount.

    Args:
        env_vars: variables of all stages; None removes a variable of `conf/performance.yaml`.

    Example:
        >>> KubernetesExecutor(image="nvcr.io/nvidia/nemo:26.02", claim="runs", mount_path="/runs").kind
        'trainjob'
    """

    env_vars: dict[str, Optional[str]] = field(default_factory=dict)  # noqa: UP045 - NeMo-Run cannot parse `str | None`


@dataclass(frozen=True)
class Resource:
    """A kind of job, as the API server addresses it.

    Args:
        group: group of the API.
        version: version of the API.
        plural: name of the resource in addresses.
        kind: name of the kind in manifests.
        pods: label of a job's pods that holds the job's name.
        operator: operator that must run in the cluster, with its oldest suitable release.
        lacks: settings for which this kind has no field, each with the place where a user sets the value instead.
    """

    group: str
    version: str
    plural: str
    kind: str
    pods: str
    operator: str
    lacks: dict[str, str]

    @property
    def crd(self) -> str:
        """Name of the kind's custom resource definition."""
        return f"{self.plural}.{self.group}"


RESOURCES = {
    "trainjob": Resource(
        *("trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob", "jobset.sigs.k8s.io/jobset-name"),
        "Kubeflow Trainer 2.2",
        {
            "restarts": "failurePolicy.maxRestarts of the runtime's JobSet",
            "image_pull_policy": "imagePullPolicy of the runtime's container",
            "priority_class": "priorityClassName of the runtime's pods (Kueue: a label kueue.x-k8s.io/priority-class)",
        },
    ),
    "pytorchjob": Resource(
        *("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob", "training.kubeflow.org/job-name"),
        "Kubeflow's training operator 1.9",
        {},
    ),
}


def resource_of(settings: JobSettings) -> Resource:
    """Return the kind of job named in the settings.

    Raises:
        UpcycleError: there is no such kind.
    """
    if settings.kind not in RESOURCES:
        raise UpcycleError.unknown("run.executor.kind", settings.kind, RESOURCES)
    return RESOURCES[settings.kind]
