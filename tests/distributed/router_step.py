"""A step of a small MoE model on real ranks: what it does to its routers, and what is measured of them.

Real Megatron models, schedules, gradient buffers and gloo groups. The language model's loss is multiplied by zero, so
what arrives at the routers' weights is the gradient of the auxiliary losses alone. Every layout cuts the batch into
the same cells (one micro-batch of one data-parallel rank), because balancing is no sum over tokens.

Attention without Transformer Engine knows no context parallelism. Its output projection is zero here, so that each
token goes its own way, wherever it is computed.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from tests.models import MemorySource, build_chunks, moe_settings, sample_tokens, small_architecture


ARCH = small_architecture(num_layers=4)
SPEC = UpcycleSpec(num_experts=4, top_k=2, router_std=0.5)
#: Sequences of a cell, tokens of a sequence, cells of a step.
BATCH, LENGTH, CELLS = 2, 8, 4
#: Of four ranks.
LAYOUTS: dict[str, dict[str, int]] = {
    "dp4": {},
    "tp2 dp2, ep2": {"tp": 2, "ep": 2},
    "cp2 dp2, ep4": {"cp": 2, "ep": 4},
    "cp4": {"cp": 4},
    "tp2 cp2": {"tp": 2, "cp": 2},
    "pp2 cp2": {"pp": 2, "cp": 2},
    "pp2 vp2 cp2": {"pp": 2, "vp": 2, "cp": 2},
}
#: Those of `make test`.
QUICK = ("tp2 cp2", "tp2 dp2, ep2")
#: Megatron of NeMo 2.7; from 0.16 on it scales auxiliary losses by the context-parallel size itself.
IS_015 = version("megatron-core").startswith("0.15.")
LOSS_SCALE = 1024.0  # of FP16


def size(layout: str, axis: str) -> int:
    """Return the size of an axis of a layout."""
    sizes = LAYOUTS[layout]
    if axis == "dp":
        return 4 // (sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1))
    return sizes.get(axis, 1)


def take_step(
    layout: str, settings: dict[str, Any], micro_batches: int, *, corrected: bool = True, spec: UpcycleSpec = SPEC
) -> dict[str, Any]:
    """Take one step.

    Args:
        layout: one of `LAYOUTS`; any other word for one rank.
        settings: of the Megatron model.
        micro_batches: of the step, on each data-parallel rank.
        corrected: whether auxiliary losses are made to act as set.
        spec: of the model.

    Returns:
        `gradients` of this rank's routers by layer; `biases` that balance their experts, likewise; `health` of all
        layers, on the first rank; `acting`: what is said to act; `receipt`: what it says of the biases.
    """
    from megatron.core import num_microbatches_calculator
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.router import TopKRouter

    from nemo_upcycle.monitoring.router_health import RouterHealth, sum_over_ranks
    from nemo_upcycle.trainers.aux_loss import correct_losses

    chunks = build_chunks(ARCH, layout=LAYOUTS.get(layout), **moe_settings(ARCH, spec) | settings)
    receipt = upcycle_into(chunks, MemorySource(ARCH), spec)
    for chunk in chunks:
        chunk.rotary_pos_emb.cp_group = None
        for name, parameter in chunk.named_parameters():
            if "linear_proj" in name:
                parameter.data.zero_()
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = lambda loss: LOSS_SCALE * loss
    acting = correct_losses(config) if corrected else []
    health = RouterHealth(chunks, config)
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    tokens = sample_tokens(ARCH.vocab_size, BATCH * CELLS, LENGTH)
    tokens = tokens.chunk(ps.get_context_parallel_world_size(), dim=1)[ps.get_context_parallel_rank()]
    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    batches = [batch.chunk(replicas)[replica] for batch in tokens.chunk(micro_batches)]
    num_microbatches_calculator.destroy_num_microbatches_calculator()
    num_microbatches_calculator.init_num_microbatches_calculator(1, None, len(tokens), len(batches[0]), replicas)
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in wrapped],
        model=wrapped,
        num_microbatches=micro_batches,
        seq_length=LENGTH,
        micro_batch_size=len(batches[0]),
    )
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    summed = sum_over_ranks(health.local(with_experts=False))
    return {
        "gradients": {router.layer_number: router.weight.main_grad / LOSS_SCALE for router in routers},
        "biases": {router.layer_number: _bias(router) for router in routers},
        "health": None if summed is None else health.describe(summed),
        "acting": acting,
        "receipt": receipt.balancing_bias,
    }


def _bias(router: Any) -> torch.Tensor | None:
    quantiles: torch.Tensor | None = getattr(router, "qb_beta", None)
    return router.expert_bias if quantiles is None else quantiles


def _forward_step(batches: Any, model: torch.nn.Module) -> Any:
    tokens = next(batches)
    length = tokens.shape[1]
    output = model(tokens, torch.arange(length)[None], torch.ones(1, 1, length, length).triu(1).bool(), labels=tokens)

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return 0.0 * losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {}

    return output, loss


def by_layer(ranks: list[dict[str, Any]], what: str) -> torch.Tensor:
    """Return `gradients` or `biases` of all layers, [L, ...]; ranks that hold the same layer must agree.

    Args:
        ranks: what each rank's step gave.
        what: name of it.
    """
    whole: dict[int, torch.Tensor] = {}
    for rank in ranks:
        for layer, values in rank[what].items():
            torch.testing.assert_close(values, whole.setdefault(layer, values), rtol=1e-5, atol=1e-9)
    return torch.stack([whole[layer] for layer in sorted(whole)])
