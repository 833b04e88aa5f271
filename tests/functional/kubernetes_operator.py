"""A stand-in for Kubeflow's Trainer: runs the command of every TrainJob as local processes, one per node."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

from kubernetes import client, config

from nemo_upcycle.pipeline.executors.local import held_port


_ADDRESS = ("trainer.kubeflow.org", "v1alpha1", "default", "trainjobs")
_READY = {"name": "node", "ready": 1, "succeeded": 0, "failed": 0, "active": 1, "suspended": 0}


class Operator(threading.Thread):
    """Watches the jobs of the namespace `default` until it is stopped.

    Args:
        kubeconfig: kubeconfig of the server.
    """

    def __init__(self, kubeconfig: Path) -> None:
        super().__init__(daemon=True)
        self._api = client.CustomObjectsApi(config.new_client_from_config(str(kubeconfig)))
        self._stopped, self._ports = threading.Event(), contextlib.ExitStack()
        self.pods: dict[str, list[subprocess.Popen[bytes]]] = {}
        self.environment: dict[str, str] = {}

    def run(self) -> None:
        """Start jobs, report their state, and end deleted jobs."""
        while not self._stopped.wait(0.3):
            jobs = {
                job["metadata"]["name"]: job for job in self._api.list_namespaced_custom_object(*_ADDRESS)["items"]
            }
            for name in set(self.pods) - set(jobs):
                self.evict(name)
                del self.pods[name]
            for name, job in jobs.items():
                if (job.get("status") or {}).get("conditions"):
                    continue
                if name not in self.pods:
                    self.pods[name] = self._start(job)
                    self._report(name, {"jobsStatus": [_READY]})
                statuses = [pod.poll() for pod in self.pods[name]]
                if None not in statuses:
                    kind = "Failed" if any(statuses) else "Complete"
                    self._report(name, {"conditions": [_condition(kind, f"exit statuses {statuses}")]})

    def stop(self) -> None:
        """Stop the operator and all pods."""
        self._stopped.set()
        self.join()
        for name in list(self.pods):
            self.evict(name)
        self._ports.close()

    def evict(self, name: str) -> None:
        """Send SIGTERM to the pods of a job, as an eviction does, and wait for them."""
        for pod in self.pods[name]:
            if pod.poll() is None:
                pod.send_signal(signal.SIGTERM)
        for pod in self.pods[name]:
            pod.wait()

    def _start(self, job: dict[str, Any]) -> list[subprocess.Popen[bytes]]:
        trainer = job["spec"]["trainer"]
        shared = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(self._ports.enter_context(held_port())),
        } | {entry["name"]: entry["value"] for entry in trainer["env"]}
        return [
            subprocess.Popen(
                trainer["command"], env=os.environ | self.environment | shared | {"PET_NODE_RANK": str(number)}
            )
            for number in range(trainer["numNodes"])
        ]

    def _report(self, name: str, status: dict[str, Any]) -> None:
        self._api.patch_namespaced_custom_object_status(*_ADDRESS, name, {"status": status})


def _condition(kind: str, message: str) -> dict[str, str]:
    time = "2026-01-01T00:00:00Z"
    return {"type": kind, "status": "True", "reason": "Pods", "message": message, "lastTransitionTime": time}
