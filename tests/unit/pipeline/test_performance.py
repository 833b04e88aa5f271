"""NVIDIA's performance settings: the table, what follows from card and layout, how they are rendered and changed."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.performance import ENVIRONMENT, SLURM, PerformanceSetting, settings_for
from nemo_upcycle.pipeline.executors.settings import cluster_for, read_executor
from nemo_upcycle.trainers.base import Profile


MOE = Profile(accelerator="gpu", tp=2, pp=4, ep=8, dispatcher="alltoall")
SITE = ["account=me", "partition=h100", "container_image=nemo"]


def _job(profile: Profile | None = MOE, name: str = "pretrain", **kwargs: Any) -> Job:
    command = ("python", "-m", "nemo_upcycle.pipeline", name, "/shared/run")
    kind: dict[str, Any] = {"nodes": 64, "ranks_per_node": 8, "is_training": True, "is_resumable": True}
    return Job(name, Path("/shared/run"), command, profile=profile, **kind | kwargs)


def _script(*overrides: str, job: Job | None = None) -> str:
    job = job or _job()
    cluster = cluster_for(read_executor("slurm", [*SITE, *overrides]))
    assert cluster is not None
    cluster.check_settings([job])
    return cluster.render(job)[f"{job.name}.sh"]


def _values(profile: Profile | None, card: str = "h100", **kwargs: Any) -> dict[str, str]:
    return performance.variables(settings_for(_job(profile), card, **kwargs))


def test_every_row_names_its_source_and_conditions_that_exist() -> None:
    rows = performance.table()[ENVIRONMENT] + performance.table()[SLURM]
    facts = performance._facts(_job(), "h100", container=True)
    for row in rows:
        assert row.keys() <= {"name", "value", "when", "unless", "source"}
        assert row["source"]
        assert isinstance(row["value"], str)
        for conditions in (row.get("when", {}), row.get("unless", {})):
            assert conditions.keys() <= facts.keys()
            cards = conditions.get("card", [])
            assert set(cards if isinstance(cards, list) else [cards]) <= set(performance.table()["cards"])


@pytest.mark.parametrize(
    ("profile", "card", "expected"),
    [
        (MOE, "h100", "1"),
        (replace(MOE, tp=1, cp=2), "h100", "1"),
        (replace(MOE, tp=1), "h100", None),
        (replace(MOE, tp=1, dispatcher="deepep"), "h100", "32"),
        (replace(MOE, overlaps_experts=True), "h100", None),
        (replace(MOE, overlaps_experts=True, dispatcher="hybridep"), "h100", "32"),
        (MOE, "b200", "32"),
        (replace(MOE, tp=1), "gb200", "32"),
        (None, "h100", None),
        (None, "b200", "32"),
    ],
)
def test_queues_follow_card_and_layout(profile: Profile | None, card: str, expected: str | None) -> None:
    assert _values(profile, card).get("CUDA_DEVICE_MAX_CONNECTIONS") == expected


def test_experts_kernels_of_deepep_leave_more_multiprocessors() -> None:
    margins = ("NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN")
    assert {_values(MOE)[name] for name in margins} == {"16"}
    assert {_values(replace(MOE, dispatcher="deepep"))[name] for name in margins} == {"20"}


def test_segments_grow_only_where_nothing_holds_their_addresses() -> None:
    assert _values(MOE)["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_CUDA_ALLOC_CONF" not in _values(MOE, "b200")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in _values(replace(MOE, cuda_graphs=True))
    registered = _values(replace(MOE, user_buffers=True))
    assert "PYTORCH_CUDA_ALLOC_CONF" not in registered
    assert registered["NCCL_NVLS_ENABLE"] == "1"
    assert _values(MOE)["NCCL_NVLS_ENABLE"] == "0"


def test_a_batch_script_of_a_training_exports_them_and_passes_options_to_srun() -> None:
    script = _script()
    for name, value in _values(MOE).items():
        assert f'\nexport {name}="{value}"\n' in script
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert {"--mpi=pmix", "--no-container-mount-home", "--container-writable"} <= set(shlex.split(srun))
    bare = _script("container_image=null")
    assert "--mpi" not in bare
    assert "--container-writable" not in bare
    assert 'export CUDA_DEVICE_MAX_CONNECTIONS="1"' in bare


@pytest.mark.parametrize(
    "job",
    [
        _job(None, "data", is_training=False, nodes=1, ranks_per_node=1),
        _job(replace(MOE, accelerator="cpu")),
        _job(replace(MOE, accelerator="auto"), "dense_ct"),
    ],
    ids=["no training", "on the CPU", "without GPUs"],
)
def test_what_does_not_train_on_gpus_has_none(job: Job) -> None:
    script = _script("stages.dense_ct.gpus_per_node=null", job=job)
    assert not [name for name in performance.names() if name in script]


def test_what_a_site_sets_wins_and_null_removes() -> None:
    script = _script(
        "env_vars={TORCH_NCCL_HIGH_PRIORITY: '0', TORCH_NCCL_AVOID_RECORD_STREAMS: null}",
        "srun_args=[--mpi=none, --container-mount-home]",
        "performance={NCCL_NVLS_ENABLE: 1, TOKENIZERS_PARALLELISM: null, --container-writable: null}",
        "stages.pretrain.performance={numactl: null}",
    )
    assert script.count("export TORCH_NCCL_HIGH_PRIORITY") == 1
    assert 'export TORCH_NCCL_HIGH_PRIORITY="0"' in script
    assert "TORCH_NCCL_AVOID_RECORD_STREAMS" not in script
    assert script.count("--mpi") == 1
    assert "--mpi=none" in script
    assert "--no-container-mount-home" not in script
    assert "numactl" not in script
    both = _script("performance={NCCL_NVLS_ENABLE: 1, TOKENIZERS_PARALLELISM: null, --container-writable: null}")
    assert 'export NCCL_NVLS_ENABLE="1"' in both
    assert "TOKENIZERS_PARALLELISM" not in both
    assert "--container-writable" not in both


def test_a_setting_that_does_not_exist_is_refused_with_the_closest() -> None:
    with pytest.raises(UpcycleError, match="Did you mean 'NCCL_NVLS_ENABLE'"):
        _script("performance={NCCL_NVLS_ENABEL: 1}")


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
    ids=["it binds", "it cannot bind", "it is not there"],
)
def test_a_rank_is_bound_to_its_gpus_memory_node_or_starts_unbound(
    numactl: str | None, expected: list[str], tmp_path: Path
) -> None:
    if numactl:
        (tmp_path / "numactl").write_text(f"#!/bin/bash\n{numactl}\n")
        (tmp_path / "numactl").chmod(0o755)
    words = [*performance.bound([PerformanceSetting("numactl", "4")]), "printf", "%s\n", "a b"]
    environment = os.environ | {"PATH": f"{tmp_path}:/bin" if numactl else "/bin", "SLURM_LOCALID": "5"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


def test_launchers_of_hang_detection_are_not_bound() -> None:
    script = _script("stages.pretrain.hang_detection=true")
    assert "fault_tolerance.launcher" in script
    assert "numactl" not in script


def test_this_machine_gets_none_without_a_gpu_and_what_its_environment_lacks_with_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert performance.settings_here(_job()) == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA GB200")
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    found = performance.variables(performance.settings_here(_job()))
    assert found["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"
    assert "NCCL_NVLS_ENABLE" not in found
    assert performance.settings_here(_job(replace(MOE, accelerator="cpu"))) == []


def test_a_profile_is_what_megatrons_settings_say() -> None:
    sizes = SimpleNamespace(
        tensor_model_parallel_size=2,
        context_parallel_size=4,
        pipeline_model_parallel_size=8,
        expert_model_parallel_size=16,
    )
    model = SimpleNamespace(
        num_moe_experts=8,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend="hybridep",
        overlap_moe_expert_parallel_comm=True,
        cuda_graph_impl="local",
    )
    ddp = SimpleNamespace(nccl_ub=True)
    found = Profile.of(sizes, model, ddp, accelerator="gpu", precision="fp8-current")
    assert [getattr(found, field.name) for field in fields(found)] == [
        *("gpu", 2, 4, 8, 16, "fp8-current", "hybridep"),
        *(True, True, True),
    ]
    plain = SimpleNamespace(num_moe_experts=None, moe_token_dispatcher_type="alltoall", cuda_graph_impl="none")
    assert Profile.of(plain, plain, "megatron", accelerator="auto", precision="bf16") == Profile()


def test_lines_say_on_which_trainings_a_setting_is_alone() -> None:
    both, one = PerformanceSetting("A", "1"), PerformanceSetting("LONG", "2")
    assert performance.lines_of({"pretrain": [both, one], "dense_ct": [both]}) == [
        "A     1",
        "LONG  2; pretrain only",
    ]
    assert performance.lines_of({}) == []
