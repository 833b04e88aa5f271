"""A Kubernetes API server on this machine: custom resources with real validation, but no pods and no controllers.

`scripts/k8s_apiserver.sh` builds it. It has no core types, so claims and namespaces cannot be tested here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.crds import published
from tests.waiting import wait_until


BINARIES = Path(os.environ.get("NEMO_UPCYCLE_K8S") or Path(__file__).parents[2] / ".cache" / "k8s")
IS_BUILT = (BINARIES / "apiserver").is_file() and (BINARIES / "etcd").is_file()
_KUBECONFIG = """\
apiVersion: v1
kind: Config
clusters: [{{name: test, cluster: {{server: "https://127.0.0.1:{port}", insecure-skip-tls-verify: true}}}}]
users: [{{name: test, user: {{client-certificate: {folder}/client.crt, client-key: {folder}/client.key}}}}]
contexts: [{{name: test, context: {{cluster: test, user: test}}}}]
current-context: test
"""
_PLUGINS = (
    "NamespaceLifecycle,MutatingAdmissionPolicy,MutatingAdmissionWebhook,"
    "ValidatingAdmissionPolicy,ValidatingAdmissionWebhook"
)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[Path]:
    """Run a server while the block runs, and yield the kubeconfig of its administrator."""
    # Only this group has all rights without a request to an authorization server.
    subject = ["-subj", "/O=system:masters/CN=test", "-addext", "extendedKeyUsage=clientAuth"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", folder / "client.key"]
    request = ["openssl", "req", "-x509", "-nodes", "-days", "2", *key, "-out", folder / "client.crt", *subject]
    subprocess.run(request, check=True, capture_output=True)
    etcd, peer, port = _free_ports(3)
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(_KUBECONFIG.format(port=port, folder=folder))
    clients, peers = f"http://127.0.0.1:{etcd}", f"http://127.0.0.1:{peer}"
    store = [
        *(BINARIES / "etcd", "--data-dir", folder / "etcd", "--log-level", "error", "--unsafe-no-fsync"),
        *("--listen-client-urls", clients, "--advertise-client-urls", clients, "--listen-peer-urls", peers),
        *("--initial-advertise-peer-urls", peers, "--initial-cluster", f"default={peers}"),
    ]
    serve = [
        *(BINARIES / "apiserver", "--etcd-servers", clients, "--bind-address", "127.0.0.1", "--secure-port", port),
        *("--cert-dir", folder / "certificates", "--client-ca-file", folder / "client.crt"),
        *("--kubeconfig", kubeconfig, "--authorization-kubeconfig", kubeconfig),
        *("--authentication-kubeconfig", kubeconfig, "--authentication-skip-lookup"),
        *("--disable-admission-plugins", _PLUGINS, "--enable-priority-and-fairness=false"),
    ]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "server.log").open("wb"))
        for command in (store, serve):
            process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
        wait_for(lambda: _definitions(kubeconfig).list_custom_resource_definition())
        yield kubeconfig


def define(kubeconfig: Path, name: str) -> None:
    """Install a published definition; first delete the installed definition of the same kind, with its objects."""
    definitions, crd = _definitions(kubeconfig), published(name)
    plural = crd["metadata"]["name"]
    if _state(kubeconfig, plural):
        definitions.delete_custom_resource_definition(plural)
        wait_for(lambda: not _state(kubeconfig, plural))
    definitions.create_custom_resource_definition(crd)
    wait_for(lambda: _state(kubeconfig, plural).get("Established"))
    time.sleep(1)  # the server uses the definition a moment after it reports this


def wait_for(condition: Callable[[], Any]) -> Any:
    """Wait until a condition holds, ignoring errors, and return its value."""

    def found() -> Any:
        with contextlib.suppress(Exception):
            return condition()
        return None

    return wait_until(found, poll_s=0.2)


def _definitions(kubeconfig: Path) -> Any:
    from kubernetes import client, config

    return client.ApiextensionsV1Api(config.new_client_from_config(str(kubeconfig)))


def _state(kubeconfig: Path, plural: str) -> dict[str, bool]:
    """Return the true conditions of a definition, or an empty dict if the definition is missing."""
    for found in _definitions(kubeconfig).list_custom_resource_definition().items:
        if found.metadata.name == plural:
            conditions = found.status.conditions if found.status else None
            return {entry.type: True for entry in conditions or () if entry.status == "True"} | {"exists": True}
    return {}


def _free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        holders = [stack.enter_context(socket.socket()) for _ in range(number)]
        for holder in holders:
            holder.bind(("127.0.0.1", 0))
        return [holder.getsockname()[1] for holder in holders]
