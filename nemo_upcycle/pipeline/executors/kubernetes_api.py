"""Make the few requests of the Kubernetes executor, and translate the API server's refusals for a user."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import UnreachableError
from nemo_upcycle.pipeline.executors.jobs import JobState, Phase
from nemo_upcycle.pipeline.executors.kubernetes_settings import RESOURCES, Resource


_TIMEOUT_S = 30
#: Fix for the user, by the words in the server's refusal.
_FIXES = {
    'unknown field "spec.runtimePatches"': "update Trainer to 2.2 or newer, or set run.executor.kind=pytorchjob",
    "terminationGracePeriodSeconds": (
        "update Trainer to 2.3 or newer, or set run.executor.termination_grace_s=0 and "
        "terminationGracePeriodSeconds in the runtime's pods"
    ),
}


class TakenError(Exception):
    """A job of this name exists already."""


class KubernetesApi:
    """A connection to an API server, with the credentials of a kubeconfig or of the pod that runs this process.

    Args:
        kubeconfig: path of the file; if empty, use $KUBECONFIG or ~/.kube/config, or else the pod's service account.
        context: context in the kubeconfig; if empty, the current context.

    Raises:
        UpcycleError: the client is not installed, or there are no credentials.
    """

    def __init__(self, kubeconfig: str, context: str) -> None:
        try:
            from kubernetes import client, config
        except ImportError:
            expected, fix = "the pipeline needs it to talk to the cluster", "run: pip install 'kubernetes>=29,<37'"
            raise UpcycleError(
                "Package kubernetes", kind="missing", got="is not installed", expected=expected, fix=fix
            ) from None
        self._client: Any = client
        configuration = client.Configuration()
        try:
            try:
                config.load_kube_config(kubeconfig or None, context or None, configuration)
            except config.ConfigException:
                if kubeconfig or context:
                    raise
                config.load_incluster_config(configuration)
        except (config.ConfigException, OSError) as error:
            raise UpcycleError(
                "Credentials for the Kubernetes cluster",
                kind="missing",
                got=f"were not found: {str(error).rstrip('.')}",
                fix="set KUBECONFIG, run.executor.kubeconfig and run.executor.context, or log in to the cluster",
            ) from None
        self._host = configuration.host
        connection = client.ApiClient(configuration)
        self._objects: Any = client.CustomObjectsApi(connection)
        self._core: Any = client.CoreV1Api(connection)

    def create(self, resource: Resource, manifest: dict[str, Any], *, dry_run: bool = False) -> None:
        """Create a job. The server refuses unknown fields.

        Args:
            resource: kind of the job.
            manifest: manifest of the job.
            dry_run: whether the server only runs its checks and creates nothing.

        Raises:
            UpcycleError: the server refuses the job.
            TakenError: a job of this name exists.
            UnreachableError: the server does not answer.
        """
        create, namespace = self._objects.create_namespaced_custom_object, manifest["metadata"]["namespace"]
        options = {"dry_run": "All"} if dry_run else {}
        self._ask(create, resource, namespace, manifest, field_validation="Strict", **options)

    def get(self, resource: Resource, namespace: str, name: str) -> dict[str, Any] | None:
        """Return a job; None if no job has this name."""
        try:
            found: dict[str, Any] = self._ask(self._objects.get_namespaced_custom_object, resource, namespace, name)
        except _AbsentError:
            return None
        return found

    def delete(self, resource: Resource, namespace: str, name: str) -> None:
        """Delete a job and its pods. A job that does not exist counts as deleted."""
        delete = self._objects.delete_namespaced_custom_object
        with contextlib.suppress(_AbsentError):
            self._ask(delete, resource, namespace, name, propagation_policy="Background")

    def lacks_claim(self, namespace: str, name: str) -> bool:
        """Return whether the server says that a PersistentVolumeClaim is missing; False if the user may not look."""
        return self._is_absent(self._core.read_namespaced_persistent_volume_claim, name, namespace)

    def lacks_queue(self, namespace: str, name: str) -> bool:
        """Return whether the server says that a LocalQueue of Kueue is missing; False if the user may not look."""
        address = ("kueue.x-k8s.io", "v1beta1", namespace, "localqueues", name)
        return self._is_absent(self._objects.get_namespaced_custom_object, *address)

    def why_pods_wait(self, namespace: str, selector: str) -> str:
        """Return why a pod waits, such as no free node or an image that cannot be pulled; empty if unknown."""
        try:
            pods = self._core.list_namespaced_pod(namespace, label_selector=selector, _request_timeout=_TIMEOUT_S)
        except Exception:  # the text is only for people, so missing rights or a broken connection do not matter
            return ""
        for status in (pod.status for pod in pods.items):
            for container in status.container_statuses or ():
                if (waits := container.state.waiting) and waits.reason not in ("ContainerCreating", "PodInitializing"):
                    return f"{waits.reason}: {waits.message or ''}".rstrip(": ")
            for condition in status.conditions or ():
                if condition.type == "PodScheduled" and condition.status == "False":
                    return f"{condition.reason}: {condition.message or ''}".rstrip(": ")
        return ""

    def _ask(
        self, request: Callable[..., Any], resource: Resource, namespace: str, what: object, **options: str
    ) -> Any:
        """Return the answer to a request about jobs of a kind. `what` is a name or a manifest."""
        address = (resource.group, resource.version, namespace, resource.plural, what)
        try:
            return request(*address, _request_timeout=_TIMEOUT_S, **options)
        except self._client.ApiException as error:
            raise _meaning(error, resource, namespace) from None
        except Exception as error:  # urllib3 raises many types, and so do plugins that fetch credentials
            *_, reason = type(error).__name__, *str(error).strip().splitlines()
            raise _unreachable(f"does not answer at {self._host} ({reason})") from None

    def _is_absent(self, request: Callable[..., Any], *address: str) -> bool:
        try:
            request(*address, _request_timeout=_TIMEOUT_S)
        except self._client.ApiException as error:
            return error.status == 404 and bool(_answer(error)[1].get("name"))
        except Exception:
            return False
        return False


def reported_state(found: dict[str, Any]) -> JobState | None:
    """Read the state that the controllers report for a job; None until a controller has reported.

    Args:
        found: the job, as the API server describes it.
    """
    spec, status = found.get("spec") or {}, found.get("status") or {}
    true = {entry["type"]: entry for entry in status.get("conditions") or () if entry.get("status") == "True"}
    for name in ("Failed", "Complete", "Succeeded"):
        if name in true:
            return JobState(Phase.ENDED, _words(true[name]))
    if "Suspended" in true or spec.get("suspend") or (spec.get("runPolicy") or {}).get("suspend"):
        return JobState(Phase.WAITING, "suspended: its queue has not admitted it, or an administrator holds it")
    if "Restarting" in true:
        return JobState(Phase.WAITING, _words(true["Restarting"]))
    if "Running" in true or any(job.get("ready") or job.get("succeeded") for job in status.get("jobsStatus") or ()):
        return JobState(Phase.RUNNING)
    return JobState(Phase.WAITING) if status else None


def _words(condition: dict[str, Any]) -> str:
    return ": ".join(text for text in (condition.get("reason"), condition.get("message")) if text) or condition["type"]


class _AbsentError(Exception):
    """No job has this name."""


def _meaning(error: Any, resource: Resource, namespace: str) -> Exception:
    """Translate a refusal of the server for the user."""
    message, details = _answer(error)
    jobs = f"{resource.plural} in namespace {namespace}"
    if error.status == 404 and details.get("kind") == "namespaces":
        return UpcycleError(
            "run.executor.namespace",
            kind="state",
            got=f"{namespace} does not exist in the cluster",
            fix="name another namespace",
        )
    if error.status == 404 and details.get("name"):
        return _AbsentError()
    if error.status == 404:
        got = "the cluster does not have"
        fix = f"install this operator, or choose another kind: {', '.join(RESOURCES)}"
        return UpcycleError(
            "run.executor.kind",
            kind="state",
            got=f"needs {resource.crd} ({resource.operator} or newer), which {got}",
            fix=fix,
        )
    if error.status == 409:
        return TakenError()
    if error.status == 401:
        what = f"Login to the cluster for {jobs}"
        return UnreachableError(what, kind="state", got=f"was refused: {message}", fix="log in again")
    if error.status == 403 and "denied the request" not in message:
        fix = "log in again, choose another run.executor.namespace or context, or ask the cluster's administrator"
        return UpcycleError(
            "This account", kind="state", got=f"may not create, get and delete {jobs}: {message}", fix=fix
        )
    if error.status in (400, 403, 422):
        fix = next((fix for words, fix in _FIXES.items() if words in message), "change run.executor accordingly")
        return UpcycleError("The API server", kind="state", got=f"refused {jobs}: {message}", fix=fix)
    return _unreachable(f"answered {error.status} {error.reason}: {message}")


def _unreachable(got: str) -> UnreachableError:
    fix = "check the network, and run.executor.kubeconfig and run.executor.context"
    return UnreachableError("The Kubernetes API server", kind="state", got=got, fix=fix)


def _answer(error: Any) -> tuple[str, dict[str, Any]]:
    """Return the message of a refusal, and the details of its subject."""
    try:
        status = json.loads(error.body)
    except (TypeError, ValueError):  # the answer comes from a proxy
        status = {}
    if not isinstance(status, dict):
        status = {}
    return str(status.get("message") or error.reason or "no reason given"), status.get("details") or {}
