"""What a Kubernetes API server's answers mean for the user, with prepared answers in place of a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.kubernetes_api import KubernetesApi
from nemo_upcycle.pipeline.executors.kubernetes_settings import RESOURCES


@pytest.fixture
def api(tmp_path: Path) -> KubernetesApi:
    """A connection that has not been tried yet."""
    cluster = {"name": "a", "cluster": {"server": "https://127.0.0.1:9"}}
    context = {"name": "a", "context": {"cluster": "a", "user": "a"}}
    named = {"clusters": [cluster], "contexts": [context], "users": [{"name": "a", "user": {}}]}
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(named | {"current-context": "a"}))
    return KubernetesApi(str(tmp_path / "kubeconfig"), "")


def _refusal(status: int, message: str, **details: str) -> Any:
    from kubernetes.client import ApiException

    answer = ApiException(status=status, reason="Refused")
    answer.body = json.dumps({"kind": "Status", "message": message, "details": details})
    return answer


@pytest.mark.parametrize(
    ("status", "message", "details", "words"),
    [
        (404, "not found", {"kind": "namespaces", "name": "team"}, r"run\.executor\.namespace team does not exist"),
        (404, "", {}, "Kubeflow Trainer 2.2 or newer"),
        (
            403,
            "User 'me' cannot create",
            {},
            "may not create, get and delete trainjobs in namespace team: User 'me' cannot",
        ),
        (401, "Unauthorized", {}, "was refused: Unauthorized. Log in again"),
        (
            403,
            "admission webhook 'v' denied the request: no runtime",
            {},
            "refused trainjobs in namespace team: admission webhook 'v' denied",
        ),
        (503, "later", {}, "Kubernetes API server answered 503 Refused: later"),
    ],
)
def test_refusals_say_what_to_change(
    status: int, message: str, details: dict[str, str], words: str, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise _refusal(status, message, **details)

    monkeypatch.setattr(api._objects, "create_namespaced_custom_object", refuse)
    with pytest.raises(UpcycleError, match=words):
        api.create(RESOURCES["trainjob"], {"metadata": {"namespace": "team"}})


def test_a_claim_is_missing_only_if_the_server_says_so(api: KubernetesApi, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [_refusal(404, "no", name="runs"), _refusal(404, "no such path"), _refusal(403, "no right")]

    def refuse(*_: Any, **__: Any) -> None:
        raise answers.pop(0)

    monkeypatch.setattr(api._core, "read_namespaced_persistent_volume_claim", refuse)
    assert [api.lacks_claim("team", "runs") for _ in range(3)] == [True, False, False]


@pytest.mark.parametrize(
    ("reason", "message", "why"),
    [
        ("ContainerCreating", None, "Unschedulable: 0/4 nodes"),
        ("ImagePullBackOff", "no such image", "ImagePullBackOff: no such image"),
    ],
)
def test_pods_say_why_they_wait(
    reason: str, message: str | None, why: str, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = SimpleNamespace(state=SimpleNamespace(waiting=SimpleNamespace(reason=reason, message=message)))
    unscheduled = SimpleNamespace(type="PodScheduled", status="False", reason="Unschedulable", message="0/4 nodes")
    status = SimpleNamespace(container_statuses=[waits], conditions=[unscheduled])
    pods = SimpleNamespace(items=[SimpleNamespace(status=status)])
    monkeypatch.setattr(api._core, "list_namespaced_pod", lambda *_, **__: pods)
    assert api.why_pods_wait("team", "a=b") == why


def test_a_missing_client_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(UpcycleError, match="pip install 'kubernetes>="):
        KubernetesApi("", "")
