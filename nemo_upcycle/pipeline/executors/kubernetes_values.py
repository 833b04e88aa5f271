"""Check a stage's Kubernetes settings for values that the server, or the job itself, would refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nemo_upcycle.errors import UpcycleError, failures
from nemo_upcycle.pipeline.executors import manifests
from nemo_upcycle.pipeline.executors.base import require_gpus, require_variables
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.kubernetes_settings import KubernetesExecutor, NodeResources, PodSettings


#: Fields of a toleration. A field with few valid values lists these values.
_TOLERATION: dict[str, tuple[str, ...]] = {
    "key": (),
    "operator": ("Exists", "Equal"),
    "value": (),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "tolerationSeconds": (),
}
#: Settings that are numbers; if a number is 0, the cluster decides.
_COUNTS = (
    *("cpus", "memory_gib", "gpus_per_node", "shared_memory_gib"),
    *("termination_grace_s", "active_deadline_s", "restarts"),
)
#: Pattern of names that Kubernetes accepts for an object.
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")


def wrong_values(job: Job, settings: KubernetesExecutor) -> list[UpcycleError]:
    """List the settings of a stage that cannot work, as far as this is known without asking a server.

    Args:
        job: job of the stage.
        settings: executor with the settings of the stage.
    """
    found = [*_unseen(job, settings), *_malformed(job, settings), *_wrong_tolerations(settings)]
    found += failures(
        [
            lambda: require_gpus(job, _gpus_per_node(settings)),
            lambda: require_variables((*settings.env_vars, *settings.secret_env_vars)),
        ]
    )
    return found


def _unseen(job: Job, settings: KubernetesExecutor) -> Iterator[UpcycleError]:
    for path in (job.run_dir, *job.reads):
        if not any(manifests.pod_path(path).is_relative_to(mount) for mount in settings.mounts.values()):
            yield UpcycleError(
                f"Folder {path}" if path == job.run_dir else str(path),
                kind="state",
                got=f"is not visible in the pods, which mount {' and '.join(settings.mounts.values())}",
                fix="use a folder below these mount paths, or set run.executor.claim, mount_path and volumes",
            )


def _gpus_per_node(settings: NodeResources) -> int | None:
    """Count the GPUs per node that a job asks for; None for GPU slices, whose number is unknown."""
    has_slices = any("gpu" in name or "/mig-" in name for name in settings.extra_resources)
    return None if has_slices and not settings.gpus_per_node else settings.gpus_per_node


def _malformed(job: Job, settings: KubernetesExecutor) -> Iterator[UpcycleError]:
    of_stage = f"run.executor.stages.{job.name}"
    for name in _COUNTS:
        if (value := getattr(settings, name)) < 0:
            yield UpcycleError(f"{of_stage}.{name}", got=value, expected="0 or more", fix="raise it, or omit it")
    if settings.memory_gib and settings.shared_memory_gib >= settings.memory_gib:
        expected = f"less than memory_gib ({settings.memory_gib}), which includes /dev/shm"
        got, fix = settings.shared_memory_gib, "lower it, or raise memory_gib"
        yield UpcycleError(f"{of_stage}.shared_memory_gib", got=got, expected=expected, fix=fix)
    names = {"namespace": settings.namespace, "claim": settings.claim, "queue": settings.queue}
    names |= {f"volumes.{claim}": claim for claim in settings.volumes}
    for name, value in names.items():
        if value and not _NAME.fullmatch(value):
            expected = "lower-case letters, digits, - and ., as in all names of Kubernetes"
            yield UpcycleError(f"run.executor.{name}", got=f"'{value}'", expected=expected, fix="correct the name")
    for claim, path in settings.mounts.items():
        if not path.startswith("/"):
            expected, fix = "an absolute path", "write, for example, /runs"
            yield UpcycleError(f"mount path of claim {claim}", got=f"'{path}'", expected=expected, fix=fix)
    for name, source in settings.secret_env_vars.items():
        secret, slash, key = source.partition("/")
        if not secret or (slash and not key):
            expected = "SECRET/KEY, or the name of a secret whose key is the variable's name"
            fix = "name a secret that `kubectl get secrets` lists"
            yield UpcycleError(f"run.executor.secret_env_vars.{name}", got=f"'{source}'", expected=expected, fix=fix)


def _wrong_tolerations(settings: PodSettings) -> Iterator[UpcycleError]:
    for toleration in settings.tolerations:
        for name, value in toleration.items():
            if name not in _TOLERATION:
                yield UpcycleError.unknown("run.executor.tolerations", name, _TOLERATION)
            elif _TOLERATION[name] and value not in _TOLERATION[name]:
                yield UpcycleError.unknown(f"run.executor.tolerations.{name}", value, _TOLERATION[name])
