"""Muon, one of Megatron's emerging optimizers: a resumed run is bit-identical, and the planner counts its states."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.parameters import StageBuffers
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.attributes import temporarily_set
from tests.bridge.runs import SPEC, refusal, whole_as_in_two_halves
from tests.distributed.ranks import run_ranks
from tests.megatron_ranks import build_rank, group_ranks


#: Muon cannot use Megatron's distributed optimizer.
MUON = {"optimizer": "muon", "use_distributed_optimizer": False}


def test_a_resumed_training_has_the_same_bits(dense: Path, tmp_path: Path) -> None:
    whole_as_in_two_halves(dense, tmp_path, lr=1e-3, ep=2, optimizer=MUON | {"bf16": False})


def test_an_optimizer_in_bf16_of_weights_in_float32_is_refused(dense: Path, tmp_path: Path) -> None:
    """Without this refusal, Megatron finds no optimizer states to save, and fails only at the first checkpoint."""
    said = refusal(dense, tmp_path / "run", SPEC, {f"optimizer.{name}": value for name, value in MUON.items()})
    assert "config.optimizer.bf16 cannot be set: weights are in float32" in said


#: Layout and number of GPUs. Together, the layouts cover every way in which ranks can share parameters.
LAYOUTS = (("tp=2,pp=2,ep=2", 8), ("ep=2", 6), ("tp=1", 3), ("tp=2", 2), ("tp=2,etp=1,ep=2", 4))


@pytest.mark.parametrize("optimizer", ["muon", "dist_muon"])
def test_the_planner_counts_every_rank_of_its_states(optimizer: str) -> None:
    run_ranks(_compare_with_plan, 1, optimizer, process_group=False)


def _compare_with_plan(optimizer: str) -> None:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    sizes = {"num_layers": 4, "hidden_size": 48, "ffn_size": 168, "num_heads": 8, "num_kv_heads": 4, "head_dim": 10}
    arch = replace(known_shape("llama3_8b"), **sizes, vocab_size=1003).upcycled(UpcycleSpec(num_experts=4))
    work = Workload(seq_length=512, global_batch=840, optimizer=optimizer)
    for text, gpus in LAYOUTS:
        layout = parse_layout(text, gpus)
        for rank in range(gpus):
            with megatron_rank(layout, rank):
                got = _allocated(build_rank(arch, layout), optimizer)
            ranks = group_ranks(layout, rank)
            plan = StageBuffers(arch, layout, work, ranks.pp)
            states = plan.optimizer_bytes(ranks.dp * layout.cp + ranks.cp, ranks.expert_dp)
            assert got == (plan.weights_bytes, plan.gradients_bytes, states), (text, rank)
            assert states <= plan.optimizer_bytes()


def _allocated(chunks: list[Any], name: str) -> tuple[int, int, int]:
    """Count the bytes of weights, gradients and optimizer states that Megatron allocates for a rank's chunks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    for chunk in chunks:  # moving to the CPU loses the attributes of parameters
        marks = [dict(vars(parameter)) for parameter in chunk.parameters()]
        for parameter, marked in zip(chunk.to_empty(device="cpu").parameters(), marks, strict=True):
            vars(parameter).update(marked)
    wrapped: list[Any] = [DistributedDataParallel(chunk.config, settings, chunk.bfloat16()) for chunk in chunks]
    config = OptimizerConfig(optimizer=name, lr=1e-3, bf16=True)

    def gather(found: list[Any], own: Any, group: Any = None) -> None:
        found[:] = [own] * len(found)

    with temporarily_set(torch.distributed, "all_gather_object", gather):
        made = get_megatron_optimizer(config, wrapped, config_overrides={}, use_gloo_process_groups=False)
    states, parts = 0, [made]
    while parts:
        part = parts.pop()
        if chained := getattr(part, "chained_optimizers", None):
            parts += chained
            continue
        part.init_state_fn(part.optimizer, part.config)
        masters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        moments = [one for kept in part.optimizer.state.values() for one in kept.values() if torch.is_tensor(one)]
        states += sum(one.nbytes for one in (*masters, *moments) if one.ndim)
    weights = sum(parameter.nbytes for one in wrapped for parameter in one.parameters())
    buffers = [buffer for one in wrapped for buffer in (*one.buffers, *one.expert_parallel_buffers)]
    return weights, sum(buffer.grad_data.nbytes for buffer in buffers), states
