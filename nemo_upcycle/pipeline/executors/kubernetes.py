"""Kubernetes: one Kubeflow job per stage, submitted when the stages before it are done."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import manifests, performance
from nemo_upcycle.pipeline.executors.base import Cluster, UnreachableError, wrong_site
from nemo_upcycle.pipeline.executors.jobs import Job, JobState, Phase, SaveLimit
from nemo_upcycle.pipeline.executors.kubernetes_api import KubernetesApi, TakenError, reported_state
from nemo_upcycle.pipeline.executors.kubernetes_settings import KubernetesExecutor, resource_of
from nemo_upcycle.pipeline.executors.kubernetes_values import wrong_values
from nemo_upcycle.utils.conf import packaged
from nemo_upcycle.utils.masking import is_secret, write_private
from nemo_upcycle.utils.writers import yaml_text


#: Settings that all stages must share, because a job is looked up only by its name.
_COMMON = ("namespace", "kind", "kubeconfig", "context", "report_within_s")
_NAMES_TRIED = 20
#: Default seconds between SIGTERM and SIGKILL of a pod.
_POD_GRACE_S = 30
#: Smallest allowed `report_within_s`. Within this time, a restarted operator must be scheduled, start and get its
#: lease. The lease is free 15 s after its last holder has ended.
_LEAST_REPORT_S = 60


class KubernetesScheduler(Cluster):
    """Kubeflow jobs in a namespace. This client submits stages in turn, because the cluster cannot hold a stage back.

    Args:
        executor: the user's settings.
        api: connection to the API server; if None, the connection is made at the first request.
    """

    name, label, settings_class = "kubernetes", "Kubernetes", KubernetesExecutor
    poll_s = 5.0
    time_setting = "active_deadline_s"

    def __init__(self, executor: KubernetesExecutor, api: KubernetesApi | None = None) -> None:
        super().__init__(executor)
        self._api = api
        self._last: dict[str, JobState] = {}
        self._silent_since_s: dict[str, float] = {}

    @property
    def identity(self) -> str:
        """See `Cluster.identity`."""
        mine = self.executor
        return f"{self.label}, namespace {mine.namespace}, kind {mine.kind}, context {mine.context or 'current'}"

    def wrong_for_all(self) -> list[UpcycleError]:
        """See `Cluster.wrong_for_all`."""
        found = wrong_site(
            self.executor,
            f"set it in a copy of {packaged('executors') / 'kubernetes.yaml'}",
            {
                "image": "the container image of the stages",
                "claim": "the PersistentVolumeClaim that runs lie on",
                "mount_path": "where the claim is mounted, here and in the pods",
            },
        )
        for stage, settings in self.executor.stages.items():
            for name, value in settings.items():
                if name in _COMMON:
                    found.append(
                        UpcycleError(
                            f"run.executor.stages.{stage}.{name}",
                            kind="refused",
                            got=f"is {value}, but this setting must be the same for all stages",
                            fix=f"set run.executor.{name}",
                        )
                    )
        if (silence_s := self.executor.report_within_s) < _LEAST_REPORT_S:
            expected = (
                f"{_LEAST_REPORT_S} or more, because an operator reports nothing for that long while it restarts"
            )
            name = "run.executor.report_within_s"
            found.append(UpcycleError(name, got=silence_s, expected=expected, fix="raise it"))
        return found

    def wrong_for(self, job: Job) -> list[UpcycleError]:
        """See `Cluster.wrong_for`."""
        return wrong_values(job, self.settings_for(job.name))

    def check(self, jobs: Sequence[Job]) -> None:
        """See `Cluster.check`: check the claims, and dry-run every job with all checks of the server."""
        self.check_settings(jobs)
        api = self._connected()
        for job in jobs:
            settings = self.settings_for(job.name)
            api.get(resource_of(settings), settings.namespace, manifests.base_name(job))  # may be forbidden
            document = self._manifest(job, f"{manifests.base_name(job)}-{_next_number(job)}")
            with contextlib.suppress(TakenError):  # `submit` chooses another name
                api.create(resource_of(settings), document, dry_run=True)
            for claim in settings.mounts:
                if api.lacks_claim(settings.namespace, claim):
                    fix = "set run.executor.claim or volumes to a claim that `kubectl get pvc` lists"
                    raise UpcycleError(
                        f"Claim {claim}",
                        kind="state",
                        got=f"does not exist in namespace {settings.namespace}",
                        fix=fix,
                    )
            if settings.queue and api.lacks_queue(settings.namespace, settings.queue):
                fix = "name a queue that `kubectl get localqueues` lists"
                raise UpcycleError(
                    "run.executor.queue",
                    kind="state",
                    got=f"{settings.queue} does not exist in namespace {settings.namespace}",
                    fix=fix,
                )

    def render(self, job: Job) -> dict[str, str]:
        """See `Cluster.render`: the manifest that the next `submit` sends."""
        return self.render_as(job, f"{manifests.base_name(job)}-{_next_number(job)}")

    def render_as(self, job: Job, identity: str) -> dict[str, str]:
        """See `Cluster.render_as`."""
        return {f"{identity}.yaml": yaml_text(self._manifest(job, identity), width=119)}

    def _manifest(self, job: Job, name: str) -> dict[str, Any]:
        fast = performance.variables(self.performance(job))
        return manifests.manifest(self.settings_for(job.name), job, name, fast)

    def submit(self, job: Job, after: Sequence[str] = ()) -> str:
        """See `Cluster.submit`: return the name of the created job, and keep its manifest in the job's folder.

        If the job of the last manifest exists and has not ended, this call returns the name of this existing job. The
        server may have accepted an earlier request although its answer was lost.
        """
        settings, number = self.settings_for(job.name), _next_number(job)
        last = f"{manifests.base_name(job)}-{number - 1}"
        if number > 1 and self._exists_and_goes_on(last):
            return last
        for name in (f"{manifests.base_name(job)}-{number + more}" for more in range(_NAMES_TRIED)):
            document = self._manifest(job, name)
            job.folder.mkdir(parents=True, exist_ok=True)
            holds_secret = any(map(is_secret, settings.env_vars))
            write_private(job.folder / f"{name}.yaml", yaml_text(document, width=119), private=holds_secret)
            try:
                self._connected().create(resource_of(settings), document)
            except TakenError:  # an earlier run at the same path uses this name
                continue
            except UnreachableError:
                self._api = None  # the next request reads the credentials anew
                raise
            return name
        got = f"{_NAMES_TRIED} jobs called {manifests.base_name(job)}-NUMBER"
        fix = f"delete jobs of earlier runs in namespace {settings.namespace}"
        raise UpcycleError(
            f"Stage '{job.name}'", kind="state", got=f"finds no free name in the cluster: {got} exist", fix=fix
        )

    def _exists_and_goes_on(self, name: str) -> bool:
        found = self._connected().get(resource_of(self.executor), self.executor.namespace, name)
        state = reported_state(found) if found else JobState(Phase.ENDED)
        return state is None or state.phase is not Phase.ENDED

    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        """See `Cluster.states`. If the server does not answer, the last known state gets the error as its reason."""
        return {identity: self._state(identity) for identity in ids}

    def cancel(self, ids: Sequence[str]) -> None:
        """See `Cluster.cancel`. The jobs are deleted, and their pods get SIGTERM."""
        for identity in ids:
            self._connected().delete(resource_of(self.executor), self.executor.namespace, identity)

    def sets_itself(self, settings: KubernetesExecutor, name: str) -> bool:
        """See `Cluster.sets_itself`. The variable may also come from a secret."""
        return name in settings.secret_env_vars or super().sets_itself(settings, name)

    def save_limits(self, job: Job) -> Sequence[SaveLimit]:
        """See `Cluster.save_limits`: the time before an evicted pod is killed."""
        mine = self.settings_for(job.name)
        grace_s, setting = mine.termination_grace_s, f"run.executor.stages.{job.name}.termination_grace_s={{seconds}}"
        setting += " (from Trainer 2.3 on)" if mine.kind == "trainjob" else ""
        return [
            SaveLimit(
                grace_s or _POD_GRACE_S,
                f"termination_grace_s {grace_s}" if grace_s else f"grace of a pod, {_POD_GRACE_S} s by default",
                "an eviction loses the work since the checkpoint before",
                setting,
            )
        ]

    def cancel_command(self, identity: str) -> str:
        """See `Cluster.cancel_command`."""
        mine, kind = self.executor, resource_of(self.executor).crd
        context = f" --context {mine.context}" if mine.context else ""
        return f"kubectl delete {kind} {identity} --namespace {mine.namespace}{context}"

    def logs(self, job: Job, identity: str) -> Sequence[Path]:
        """See `Cluster.logs`: one file per node, which the pods write into the run's folder."""
        return [job.folder / f"{identity}-node{number}.log" for number in range(job.nodes)]

    def resources(self, job: Job) -> dict[str, str]:
        """See `Cluster.resources`."""
        settings = self.settings_for(job.name)
        found = {
            "queue": settings.queue,
            "user": "{}:{}".format(*settings.user) if settings.user else "",
            "GPUs per node": settings.gpus_per_node,
            "CPUs per node": settings.cpus,
            "memory per node": f"{settings.memory_gib} GiB" if settings.memory_gib else "",
            "time": f"{settings.active_deadline_s}s" if settings.active_deadline_s else "",
            "image": settings.image,
        }
        return {name: str(value) for name, value in found.items() if value}

    def _connected(self) -> KubernetesApi:
        if self._api is None:
            self._api = KubernetesApi(self.executor.kubeconfig, self.executor.context)
        return self._api

    def _state(self, identity: str) -> JobState:
        resource, namespace = resource_of(self.executor), self.executor.namespace
        try:
            found = self._connected().get(resource, namespace, identity)
        except UpcycleError as error:  # an expired token or lost connection must not end hours of work
            self._api = None  # the next request reads the credentials anew
            last = self._last.get(identity, JobState(Phase.WAITING))
            return JobState(last.phase, f"not known: {error}")
        if found is None:
            return JobState(Phase.ENDED, "deleted")
        state = reported_state(found)
        if state is None:
            state = self._silence(identity)
        else:
            self._silent_since_s.pop(identity, None)
        if state == JobState(Phase.WAITING):  # the job itself gives no reason
            why = self._connected().why_pods_wait(namespace, f"{resource.pods}={identity}")
            state = JobState(Phase.WAITING, why or "its pods are not ready yet")
        self._last[identity] = state
        return state

    def _silence(self, identity: str) -> JobState:
        """Return the state of a job on which no controller has reported yet."""
        silent_s = time.monotonic() - self._silent_since_s.setdefault(identity, time.monotonic())
        if silent_s < self.executor.report_within_s:
            return JobState(Phase.WAITING, "no controller has reported on it yet")
        resource = resource_of(self.executor)
        runtime = f", with the runtime '{self.executor.runtime}'" if resource.kind == "TrainJob" else ""
        why = f"no controller has reported on it for {silent_s:.0f} s: does {resource.operator} or newer run{runtime}?"
        return JobState(Phase.ENDED, why, is_abandoned=True)


def _next_number(job: Job) -> int:
    """Return the number of a stage's next job: one more than the highest number of a manifest in its folder."""
    pattern = re.compile(rf"{re.escape(manifests.base_name(job))}-(\d+)\.yaml")
    found = (pattern.fullmatch(path.name) for path in job.folder.glob("*.yaml"))
    return max((int(match[1]) for match in found if match), default=0) + 1
