"""What is wrong with a stage's settings on Kubernetes, as far as no server has to be asked."""

from __future__ import annotations

import re
from collections.abc import Iterable

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import manifests
from nemo_upcycle.pipeline.executors.base import Job
from nemo_upcycle.pipeline.executors.kubernetes_settings import KubernetesExecutor


#: The fields of a toleration, and what those with few values take.
TOLERATION = ("key", "operator", "value", "effect", "tolerationSeconds")
_VALUES = {
    "operator": ("Exists", "Equal"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}
#: Names that bash, a pod's first process, hands on.
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
#: An operator that starts again has to be scheduled, to start and to get its lease, 15 s after the last holder's end.
LEAST_REPORT_S = 60


def require_sound(job: Job, settings: KubernetesExecutor) -> None:
    """Check the settings of a stage.

    Raises:
        UpcycleError: one cannot work.
    """
    manifests.require_fields(settings)
    _require_paths(job, settings)
    _require_gpus(job, settings)
    _require_memory(job, settings)
    for toleration in settings.tolerations:
        _require_known("tolerations", toleration, TOLERATION)
        for name, values in _VALUES.items():
            if name in toleration:
                _require_known(f"tolerations.{name}", (toleration[name],), values)
    for name in (*settings.env_vars, *settings.secret_env_vars):
        if not _VARIABLE.fullmatch(name):
            raise UpcycleError(
                "run.executor.env_vars", got=f"'{name}'", expected="letters, digits and _ in a name", fix="rename it"
            )
    for name, source in settings.secret_env_vars.items():
        secret, slash, key = source.partition("/")
        if not secret or (slash and not key):
            raise UpcycleError(
                f"run.executor.secret_env_vars.{name}",
                got=f"'{source}'",
                expected="SECRET/KEY, or the name of a secret that has the variable's name as a key",
                fix="name a secret of the namespace: kubectl get secrets",
            )


def require_patience(settings: KubernetesExecutor) -> None:
    """Check that a job is not given up while its operator starts again.

    Raises:
        UpcycleError: it would be.
    """
    if settings.report_within_s < LEAST_REPORT_S:
        raise UpcycleError(
            "run.executor.report_within_s",
            got=settings.report_within_s,
            expected=f"{LEAST_REPORT_S} or more: an operator that starts again is silent so long",
            fix="raise it",
        )


def _require_known(setting: str, names: Iterable[str], known: Iterable[str]) -> None:
    for name in names:
        if name not in known:
            raise UpcycleError.unknown(f"run.executor.{setting}", name, known)


def _require_paths(job: Job, settings: KubernetesExecutor) -> None:
    for path in (job.run_dir, *job.reads):
        if not any(manifests.pod_path(path).is_relative_to(mount) for mount in settings.mounts.values()):
            raise UpcycleError(
                f"dir {path}" if path == job.run_dir else str(path),
                got="a path that the pods do not see",
                expected=f"one below {' or '.join(settings.mounts.values())}",
                fix="put it there, or set run.executor.claim, mount_path and volumes",
            )


def _require_gpus(job: Job, settings: KubernetesExecutor) -> None:
    setting = f"run.executor.stages.{job.name}.gpus_per_node"
    if 0 < settings.gpus_per_node < job.ranks_per_node:
        raise UpcycleError(
            setting,
            got=settings.gpus_per_node,
            expected=f"at least {job.ranks_per_node}, the ranks per node",
            fix=f"raise it, or lower {job.name}.trainer.devices",
        )
    needs_gpus = job.profile is not None and job.profile.accelerator == "gpu"
    has_slices = any("gpu" in name or "/mig-" in name for name in settings.extra_resources)
    if needs_gpus and not settings.gpus_per_node and not has_slices:
        raise UpcycleError(
            setting, got=0, expected=f"{job.ranks_per_node}, one a rank: the recipe trains on GPUs", fix="set it"
        )


def _require_memory(job: Job, settings: KubernetesExecutor) -> None:
    if settings.memory_gib and settings.shared_memory_gib >= settings.memory_gib:
        raise UpcycleError(
            f"run.executor.stages.{job.name}.shared_memory_gib",
            got=settings.shared_memory_gib,
            expected=f"less than memory_gib ({settings.memory_gib}), of which /dev/shm is a part",
            fix="lower it, or raise memory_gib",
        )
