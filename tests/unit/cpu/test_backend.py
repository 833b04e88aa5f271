"""The parts of the CPU backend that one process can show. What changes a process runs in one of its own."""

from __future__ import annotations

import copy
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


def test_adam_continues_from_its_state() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(4))
    optimizer = FusedCpuAdam([param], lr=1e-2)
    grads = torch.randn(4, 4)
    for grad in grads[:2]:
        param.grad = grad
        optimizer.step()
    other = torch.nn.Parameter(param.detach().clone())
    resumed = FusedCpuAdam([other], lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["step"] == 2
    assert set(resumed.state[other]) == {"exp_avg", "exp_avg_sq"}
    for grad in grads[2:]:
        param.grad, other.grad = grad.clone(), grad.clone()
        optimizer.step()
        resumed.step()
    assert torch.equal(param, other)


def _stock_config() -> dict[str, Any]:
    import nemo_run as run
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from nemo.collections import llm

    assert use_cpu_backend()
    assert use_cpu_backend()
    spec = functools.partial(get_gpt_decoder_block_spec, use_transformer_engine=True)
    plain, mixed = (
        llm.Llama3Config8B(num_moe_experts=8, moe_grouped_gemm=True),
        llm.Llama3Config8B(transformer_layer_spec=spec),
    )
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


def test_a_stock_configuration_is_adapted_but_recorded_as_written_and_a_run_config_visibly() -> None:
    (made,) = run_ranks(_stock_config, 1)
    assert made["fusions"] == [False, False, False]
    assert made["recorded"] == {"num_moe_experts": 8, "moe_grouped_gemm": True}
    assert made["spec"] == "local_layer_spec"
    assert made["mixed"] == {"use_transformer_engine": False}
    assert made["hidden"] == 4096


def _devices() -> list[str]:
    assert use_cpu_backend()
    with torch.device("meta"):
        inside = torch.zeros(2)
    made = [
        torch.zeros(2, device="cuda"),
        torch.zeros(2, device=torch.cuda.current_device(), pin_memory=True),
        torch.ones(2).to("cuda:0", non_blocking=True),
        torch.ones(2).cuda().pin_memory(),
        torch.zeros(2, device="meta"),
        inside,
    ]
    return [f"{tensor.device} {tensor.type()}" for tensor in made]


def test_only_cuda_is_read_as_cpu() -> None:
    (seen,) = run_ranks(_devices, 1)
    assert seen[:4] == ["cpu torch.FloatTensor"] * 4
    assert [device.split()[0] for device in seen[4:]] == ["meta", "meta"]


def _padded_expert() -> tuple[list[int], float]:
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.mlp import MLP
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert use_cpu_backend()
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    sizes = {"num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 32, "num_attention_heads": 2}
    activation = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "add_bias_linear": False}
    modules = get_mlp_module_spec(use_te=False).submodules
    expert = MLP(TransformerConfig(**sizes, **activation), modules, is_expert=True, ffn_hidden_size=32)
    computed: list[int] = []
    expert.linear_fc1.register_forward_pre_hook(lambda _, inputs: computed.append(len(inputs[0])))
    worst = 0.0
    for tokens in (0, 1, 15, 17, 100, 1000, 1025):
        hidden, weights = torch.randn(tokens, 16), torch.rand(tokens)
        results = []
        for compute in (MLP.forward, MLP.forward.__wrapped__):
            expert.zero_grad()
            rows = hidden.clone().requires_grad_()
            output, _ = compute(expert, rows, weights)
            (1000 * output).sum().backward()
            results.append([output, rows.grad, *(param.grad for param in expert.parameters())])
        for mine, theirs in zip(*results, strict=True):
            assert mine.shape == theirs.shape
            assert not tokens or theirs.abs().max() > 0
            worst = max([worst, *((mine - theirs).abs() / (theirs.abs() + 1e-3)).flatten().tolist()])
    return computed[::2], worst


def test_an_expert_computes_few_numbers_of_tokens_and_the_same_outputs_and_gradients() -> None:
    ((computed, worst),) = run_ranks(_padded_expert, 1)
    assert computed == [0, 1, 15, 18, 104, 1024, 1152]
    assert worst < 1e-3
