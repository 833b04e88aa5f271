"""Takes one step of a small MoE model on real ranks, and returns router gradients, biases and health.

Megatron's models, schedules, gradient buffers and gloo groups are real. Every layout cuts the batch into the same
cells (one micro-batch of one data-parallel rank), because balancing is not a sum over tokens.

Attention without Transformer Engine does not support context parallelism. The attention's output projection is zero
here, so that tokens do not influence each other on any rank.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from tests.models import MemorySource, build_chunks, moe_settings, sample_tokens, small_architecture


ARCH = small_architecture(num_layers=4)
#: Sequences per cell, tokens per sequence, cells per step.
BATCH, LENGTH, CELLS = 2, 8, 4
#: Whether this is the Megatron of NeMo 2.7. From 0.16 on, Megatron scales auxiliary losses by context parallelism.
IS_015 = version("megatron-core").startswith("0.15.")
LOSS_SCALE = 1024.0  # as in FP16


def take_step(
    layout: dict[str, int],
    settings: dict[str, Any],
    spec: UpcycleSpec,
    micro_batches: int | None = None,
    prepare: Callable[[list[Any], Any], Any] | None = None,
) -> dict[str, Any]:
    """Take one step in which only the auxiliary losses give gradients: the language model's loss has weight zero.

    Args:
        layout: layout sizes other than 1.
        settings: settings of the Megatron model.
        spec: spec of the model.
        micro_batches: micro-batches per step on each data-parallel rank, or None for one per cell.
        prepare: function to call with the chunks and their configuration before the step.

    Returns:
        A dict with `gradients` (of this rank's routers, by layer), `biases` (that balance the experts, by layer),
        `health` (of all layers, only on the first rank), `prepared` (the result of `prepare`) and `receipt` (the
        receipt's entry about the biases).
    """
    from megatron.core import num_microbatches_calculator
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.router import TopKRouter

    from nemo_upcycle.trainers.monitoring.router_health import RouterHealth, sum_over_ranks

    chunks = build_chunks(ARCH, layout=layout, **moe_settings(ARCH, spec) | settings)
    receipt = upcycle_into(chunks, MemorySource(ARCH), spec)
    for chunk in chunks:
        chunk.rotary_pos_emb.cp_group = None
        for name, parameter in chunk.named_parameters():
            if "linear_proj" in name:
                parameter.data.zero_()
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = lambda loss: LOSS_SCALE * loss
    prepared = prepare(chunks, config) if prepare else None
    health = RouterHealth(chunks, config)
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    tokens = sample_tokens(ARCH.vocab_size, BATCH * CELLS, LENGTH)
    tokens = tokens.chunk(ps.get_context_parallel_world_size(), dim=1)[ps.get_context_parallel_rank()]
    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    micro_batches = micro_batches or CELLS // replicas
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
        "prepared": prepared,
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
        number = torch.tensor(losses.numel(), dtype=torch.int)
        return 0.0 * losses.sum(), number, {"loss": float(losses.mean())}

    return output, loss


def by_layer(ranks: list[dict[str, Any]], what: str) -> torch.Tensor:
    """Return `gradients` or `biases` of all layers, [L, ...]; ranks that hold the same layer must agree.

    Args:
        ranks: result of each rank's step.
        what: `gradients` or `biases`.
    """
    whole: dict[int, torch.Tensor] = {}
    for rank in ranks:
        for layer, values in rank[what].items():
            torch.testing.assert_close(values, whole.setdefault(layer, values), rtol=1e-5, atol=1e-9)
    return torch.stack([whole[layer] for layer in sorted(whole)])
