"""A recipe trains on gloo ranks without CUDA, and every layout gives the same numbers as one rank."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from nemo_upcycle.cpu.backend import use_cpu_backend
from tests.distributed.ranks import run_ranks
from tests.functional.runs import Runs
from tests.tiers import quick


pytestmark = pytest.mark.full
SPEC = "resume.restore_config.spec"
#: Settings that make experts differ.
NOISE = {f"{SPEC}.method": "noise", f"{SPEC}.noise_std": 0.5}
PLAIN = {f"{holder}.use_distributed_optimizer": False for holder in ("optim.config", "trainer.strategy.ddp")}
LAYOUTS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {"tp": 2}, {}),
    # Two interleaved stages send two messages at a time between the same two ranks.
    (2, {"pp": 2}, {"trainer.strategy.virtual_pipeline_model_parallel_size": 2}),
    (2, {"ep": 2}, {}),
    (2, {"ep": 2}, {"model.config.moe_token_dispatcher_type": "allgather"}),
    (2, {}, PLAIN),
    (4, {"ep": 4}, {}),
    (4, {"tp": 2, "ep": 4}, {"trainer.strategy.expert_tensor_parallel_size": 1}),
    (8, {"tp": 2, "pp": 2, "ep": 2}, {}),  # uneven numbers of tokens on the tensor-parallel ranks
]
BIASES = {
    "model.config.moe_router_score_function": "sigmoid",
    f"{SPEC}.router_score": "sigmoid",
    "model.config.moe_router_enable_expert_bias": True,
    "model.config.moe_router_load_balancing_type": "none",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("cpu"))


def _train(runs: Runs, world_size: int, settings: dict[str, Any], steps: int = 2, **layout: int) -> list[list[float]]:
    """Return the loss and the gradient norm of each step."""
    name = f"run {len([*runs.folder.iterdir()])}"
    lines = runs.train(name, world_size, steps=steps, settings=NOISE | settings, **layout)
    return [[line["loss"], line["grad_norm"]] for line in lines]


@pytest.fixture(scope="module")
def alone(runs: Runs) -> list[list[float]]:
    return _train(runs, 1, {})


@pytest.mark.parametrize(
    ("world_size", "layout", "settings"), quick(LAYOUTS, (2, {"tp": 2}, {}), (2, {"ep": 2}, {})), ids=str
)
def test_every_layout_trains_as_one_rank(
    runs: Runs, alone: list[list[float]], world_size: int, layout: dict[str, int], settings: dict[str, Any]
) -> None:
    for got, expected in zip(_train(runs, world_size, settings, **layout), alone, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def test_biases_that_balance_experts_move(runs: Runs) -> None:
    rate = "model.config.moe_router_bias_update_rate"
    moved, fixed = (_train(runs, 1, BIASES | {rate: value}, steps=3) for value in (0.1, 0))
    assert moved[0] == fixed[0]
    assert abs(moved[2][0] - fixed[2][0]) > 1e-4


def test_dropout_is_repeated_by_recomputation(runs: Runs, alone: list[list[float]]) -> None:
    dropout = {f"model.config.{kind}_dropout": 0.2 for kind in ("hidden", "attention")}
    again = {"granularity": "full", "method": "uniform", "num_layers": 1}
    again = {f"model.config.recompute_{name}": value for name, value in again.items()}
    plain, recomputed = (_train(runs, 2, dropout | more, tp=2) for more in ({}, again))
    assert recomputed[1] == pytest.approx(plain[1], rel=1e-6)
    assert abs(plain[0][0] - alone[0][0]) > 1e-3


def _gradient_that_one_rank_has_late(distributed: bool) -> float:
    """Return a gradient of ones that the ranks reduce during the backward pass while one rank is late."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer import TransformerConfig

    use_cpu_backend()
    parallel_state.initialize_model_parallel()
    layer = torch.nn.Linear(512, 512, bias=False)
    overlap = DistributedDataParallelConfig(overlap_grad_reduce=True, use_distributed_optimizer=distributed)
    model = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1), overlap, layer
    )
    model.zero_grad_buffer()
    time.sleep(torch.distributed.get_rank())
    model(torch.ones(1, 512)).sum().backward()
    model.finish_grad_sync()
    return float(layer.weight.main_grad.min())


@pytest.mark.parametrize("distributed", [False, True])
def test_gradients_are_complete_before_a_step(distributed: bool) -> None:
    assert run_ranks(_gradient_that_one_rank_has_late, 2, distributed)[0] == 1.0
