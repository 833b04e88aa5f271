"""NVIDIA's performance settings: the table, the values for a card and layout, rendering and overrides."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.performance import ENVIRONMENT, SLURM, performance_settings
from nemo_upcycle.trainers.facts import Profile
from tests.unit.pipeline.test_executors import script_of


MOE = Profile(accelerator="gpu", tp=2, pp=4, ep=8, dispatcher="alltoall")


def _job(profile: Profile | None = MOE, name: str = "pretrain", **kwargs: Any) -> Job:
    command = ("python", "-m", "nemo_upcycle.pipeline", name, "/shared/run")
    kind: dict[str, Any] = {"nodes": 64, "ranks_per_node": 8, "is_training": True, "is_resumable": True}
    return Job(name, Path("/shared/run"), command, profile=profile, **kind | kwargs)


def _script(*overrides: str, job: Job | None = None) -> str:
    return script_of(job or _job(), "container_image=nemo", *overrides)


def test_every_row_names_its_source_and_conditions_that_exist() -> None:
    facts = performance._facts(_job(), "h100", container=True)
    for row in performance.table()[ENVIRONMENT] + performance.table()[SLURM]:
        assert row["source"]
        for conditions in (row.get("when", {}), row.get("unless", {})):
            assert conditions.keys() <= facts.keys()
            assert {*np.atleast_1d(conditions.get("card", []))} <= {*performance.table()["cards"]}


QUEUES, MARGIN, SEGMENTS = "CUDA_DEVICE_MAX_CONNECTIONS", "NVTE_FWD_LAYERNORM_SM_MARGIN", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    ("profile", "card", "name", "expected"),
    [
        (MOE, "h100", QUEUES, "1"),
        (replace(MOE, tp=1), "h100", QUEUES, None),
        (replace(MOE, tp=1, dispatcher="deepep"), "h100", QUEUES, "32"),
        (replace(MOE, overlaps_experts=True, dispatcher="hybridep"), "h100", QUEUES, "32"),
        (MOE, "b200", QUEUES, "32"),
        (None, "h100", QUEUES, None),
        (MOE, "h100", MARGIN, "16"),
        (replace(MOE, dispatcher="deepep"), "h100", MARGIN, "20"),
        (MOE, "h100", SEGMENTS, "expandable_segments:True"),
        (MOE, "b200", SEGMENTS, None),
        (replace(MOE, cuda_graphs=True), "h100", SEGMENTS, None),
        (replace(MOE, user_buffers=True), "h100", SEGMENTS, None),
        (replace(MOE, user_buffers=True), "h100", "NCCL_NVLS_ENABLE", "1"),
        (MOE, "h100", "NCCL_NVLS_ENABLE", "0"),
    ],
)
def test_settings_follow_card_and_layout(profile: Profile | None, card: str, name: str, expected: str | None) -> None:
    assert performance_settings(_job(profile), card).get(name) == expected


def test_what_does_not_train_on_gpus_has_none() -> None:
    data = _job(None, "data", is_training=False, nodes=1, ranks_per_node=1)
    for job in (data, _job(replace(MOE, accelerator="cpu")), _job(replace(MOE, accelerator="auto"), "dense_ct")):
        script = _script("stages.dense_ct.gpus_per_node=null", job=job)
        assert not [name for name in performance.names() if name in script]


def test_what_a_site_sets_wins_and_null_removes() -> None:
    script = _script(
        "env_vars={TORCH_NCCL_HIGH_PRIORITY: '0', TORCH_NCCL_AVOID_RECORD_STREAMS: null}",
        "srun_args=[--mpi=none, --container-mount-home]",
        "stages.pretrain.performance={numactl: null}",
    )
    assert re.findall('export TORCH_NCCL_HIGH_PRIORITY="(.*)"', script) == ["0"]
    assert re.findall(r"--mpi=(\w+)", script) == ["none"]
    gone = ("TORCH_NCCL_AVOID_RECORD_STREAMS", "--no-container-mount-home", "numactl")
    assert [word for word in gone if word in script] == []
    both = _script("performance={NCCL_NVLS_ENABLE: 1, TOKENIZERS_PARALLELISM: null, --container-writable: null}")
    assert [word for word in ('export NCCL_NVLS_ENABLE="1"', "--mpi=pmix") if word not in both] == []
    assert [word for word in ("TOKENIZERS_PARALLELISM", "--container-writable") if word in both] == []
    assert "--mpi" not in _script("container_image=null")


@pytest.mark.parametrize(("nodes", "expected"), [(16, 16), (18, 18), (64, 16), (37, 1)])
def test_a_rack_of_grace_nodes_holds_a_divisor_of_them(nodes: int, expected: int) -> None:
    script = _script("card=gb200", job=_job(nodes=nodes, ranks_per_node=4))
    assert f"#SBATCH --segment={expected}\n" in script
    assert "--segment" not in _script(job=_job(nodes=nodes, ranks_per_node=4)), "an H100"
    assert "--segment=8\n" in _script("card=gb200", "segment=8", job=_job(nodes=nodes, ranks_per_node=4))


@pytest.mark.parametrize(
    ("numactl", "expected"),
    [
        ('echo "$1 $2"; shift 2; exec "$@"', ["--cpunodebind=1 --membind=1", "a b"]),
        ("exit 1", ["a b"]),
        (None, ["a b"]),
    ],
)
def test_a_rank_is_bound_near_its_gpu_or_unbound(numactl: str | None, expected: list[str], tmp_path: Path) -> None:
    if numactl:
        (tmp_path / "numactl").write_text(f"#!/bin/bash\n{numactl}\n")
        (tmp_path / "numactl").chmod(0o755)
    words = [*performance.bound({"numactl": "4"}), "printf", "%s\n", "a b"]
    environment = os.environ | {"PATH": f"{tmp_path}:/bin" if numactl else "/bin", "SLURM_LOCALID": "5"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


def test_doctor_names_what_this_environment_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert performance.performance_settings_here(_job()) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GB200")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    found = performance.variables(performance.performance_settings_here(_job()))
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert "NCCL_NVLS_ENABLE" not in found
    assert performance.performance_settings_here(_job(replace(MOE, accelerator="cpu"))) == {}


def test_a_profile_is_what_megatrons_settings_say() -> None:
    kinds = zip(("tensor_model", "context", "pipeline_model", "expert_model"), (2, 4, 8, 16), strict=True)
    sizes = SimpleNamespace(**{f"{kind}_parallel_size": size for kind, size in kinds})
    model = SimpleNamespace(num_moe_experts=8, moe_token_dispatcher_type="flex", cuda_graph_impl="local")
    model.moe_flex_dispatcher_backend, model.overlap_moe_expert_parallel_comm = "hybridep", True
    found = Profile.of(sizes, model, SimpleNamespace(nccl_ub=True), accelerator="gpu", precision="fp8-current")
    assert astuple(found) == ("gpu", 2, 4, 8, 16, "fp8-current", "hybridep", True, True, True)
    plain = SimpleNamespace(num_moe_experts=None, moe_token_dispatcher_type="alltoall", cuda_graph_impl="none")
    assert Profile.of(plain, plain, "megatron", accelerator="auto", precision="bf16") == Profile()
