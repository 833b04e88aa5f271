"""Tests of the CPU backend that need one process. A test that changes global state runs in a separate process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from nemo_upcycle.cpu.adam import FusedCpuAdam
from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.cpu.configuration import configure_for_cpu
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    ("decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)], ids=["adamw", "adam"]
)
def test_adam_computes_what_torch_computes(decoupled: bool, reference: Any) -> None:
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(size)) for size in ((5, 7), (3,), (0,))]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    optimizers = FusedCpuAdam(ours, **settings, adam_w_mode=decoupled), reference(theirs, **settings)
    for _ in range(4):
        for mine, yours in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            yours.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, yours in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, yours, rtol=1e-5, atol=1e-7)


def _stock_config() -> dict[str, Any]:
    import nemo_run as run
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from nemo.collections import llm

    assert use_cpu_backend()
    assert use_cpu_backend()
    spec = functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    plain = llm.Llama3Config8B(num_moe_experts=8, moe_grouped_gemm=True)
    mixed = llm.Llama3Config8B(transformer_layer_spec=spec)
    shown = run.Config(llm.Llama31Config8B, num_moe_experts=8)
    configure_for_cpu(shown)
    assert shown.apply_rope_fusion is False
    assert shown.transformer_layer_spec is llm.gpt.model.base.local_layer_spec
    assert shown.num_moe_experts == 8
    return {
        "fusions": [plain.apply_rope_fusion, plain.moe_grouped_gemm, plain.deallocate_pipeline_outputs],
        "recorded": dict(plain.__io__.__arguments__),
        "spec": plain.transformer_layer_spec.__name__,
        "mixed": mixed.transformer_layer_spec.keywords,
        "hidden": plain.hidden_size,
    }


def test_a_stock_configuration_is_recorded_as_written() -> None:
    (made,) = run_ranks(_stock_config, 1)
    assert made["fusions"] == [False, False, False]
    assert made["recorded"] == {"num_moe_experts": 8, "moe_grouped_gemm": True}
    assert made["spec"] == "local_layer_spec"
    assert made["mixed"] == {"use_transformer_engine": False}
    assert made["hidden"] == 4096


def _clip() -> tuple[float, list[float]]:
    """Return the gradient norm, and the gradients after clipping to 0.5."""
    assert use_cpu_backend()
    from megatron.core.optimizer import clip_grads, optimizer

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    norm = clip_grads.get_grad_norm_fp32([weight.grad], grad_stats_parallel_group=torch.distributed.group.WORLD)
    optimizer.clip_grad_by_total_norm_fp32([weight], 0.5, norm)
    return norm, weight.grad.tolist()


def test_clipping_scales_gradients_to_the_limit() -> None:
    ((norm, clipped),) = run_ranks(_clip, 1)
    assert norm == 5
    assert clipped == pytest.approx([0.3, 0.4], rel=1e-5)
