"""Published definitions of Kubeflow's training jobs (Apache-2.0), shortened by `scripts/crd_schemas.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.kubernetes_settings import KubernetesExecutor
from tests.golden.forecasts import jobs_of_chain


#: Published definition -> kind of executor that uses it.
KINDS = {"trainjob-2.2": "trainjob", "trainjob-2.3": "trainjob", "pytorchjob-1.9": "pytorchjob"}
RECIPES = ("llama3_8b_e8t2", "llama31_8b_e8t2", "llama3_70b_e8t2", "qwen3_8b_e8t2", "smollm2_135m_e8t2")


def published(name: str) -> dict[str, Any]:
    """Return a published definition."""
    return json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))["crd"]


def closed_schema(name: str) -> dict[str, Any]:
    """Return a definition as a JSON schema that rejects unknown fields; CEL rules are not included."""
    return _closed(published(name)["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    closed = dict(schema)
    if "properties" in schema:
        closed["properties"] = {key: _closed(inner) for key, inner in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        closed["additionalProperties"] = _closed(schema["additionalProperties"])
    if "items" in schema:
        closed["items"] = _closed(schema["items"])
    return closed


def jobs_of(recipe: str, run_dir: Path) -> list[Job]:
    """Return the jobs of all stages of a recipe, with the nodes and ranks of each job."""
    from nemo_upcycle import recipes

    return jobs_of_chain(getattr(recipes, recipe).pipeline_recipe(dir=str(run_dir)), run_dir)


_PREFERENCE = {"weight": 1, "preference": {"matchExpressions": [{"key": "rack", "operator": "In", "values": ["a"]}]}}


def executor(definition: str, mount: Path, **fields: Any) -> KubernetesExecutor:
    """Return executor settings that use every field of a definition."""
    kind = KINDS[definition]
    has = {
        "restarts": 3 if kind == "pytorchjob" else 0,
        "termination_grace_s": 0 if definition == "trainjob-2.2" else 600,
        "priority_class": "high" if kind == "pytorchjob" else "",
        "image_pull_policy": "Always" if kind == "pytorchjob" else "",
    }
    settings = {
        **{"namespace": "team", "kind": kind, "queue": "gpus", "image": "nvcr.io/nvidia/nemo:26.02"},
        **{"claim": "runs", "mount_path": str(mount), "volumes": {"datasets": "/data"}, "run_as": "1000:1000"},
        **{"cpus": 16, "memory_gib": 64, "shared_memory_gib": 32, "extra_resources": {"rdma/ib": 8}},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "node_selector": {"pool": "h100"},
        "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [_PREFERENCE]}},
        **{"labels": {"team": "llm"}, "annotations": {"note": "a test"}},
        "overrides": {"schedulingGates": [{"name": "example.com/gate"}]},
        **{"pull_secrets": ["ngc"], "service_account": "trainer"},
        **{"env_vars": {"NCCL_DEBUG": "WARN"}, "secret_env_vars": {"HF_TOKEN": "hub/token"}},
        **{"report_within_s": 60, "active_deadline_s": 86400},
        "security_context": {"capabilities": {"add": ["IPC_LOCK"]}},
        "stages": {"pretrain": {"gpus_per_node": 8}, "dense_ct": {"gpus_per_node": 8}},
    }
    return KubernetesExecutor(**{**settings, **has, **fields})
