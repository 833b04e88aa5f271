"""Forward passes of a Megatron model through the pipeline, without training it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def evaluating(chunks: Sequence[Any]) -> Iterator[None]:
    """Evaluate a model without dropout, auxiliary loss and dropped tokens, and restore the model's state afterwards.

    If a model drops tokens, an answer depends on the rest of the batch. The exported model drops no tokens.
    """
    from megatron.core.transformer.moe.moe_layer import MoELayer

    layers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, MoELayer)]
    configs = {id(layer.config): layer.config for layer in layers}.values()
    dispatchers = [layer.token_dispatcher for layer in layers]
    was_training = [chunk.training for chunk in chunks]
    factors = [config.moe_expert_capacity_factor for config in configs]
    states = [dict(vars(dispatcher)) for dispatcher in dispatchers]  # each state says how to exchange padded tokens
    try:
        for chunk in chunks:
            chunk.eval()
        for config in configs:
            config.moe_expert_capacity_factor = None
        for dispatcher in dispatchers:
            dispatcher.drop_and_pad = False
        with torch.no_grad():
            yield
    finally:
        for chunk, training in zip(chunks, was_training, strict=True):
            chunk.train(training)
        for config, factor in zip(configs, factors, strict=True):
            config.moe_expert_capacity_factor = factor
        for dispatcher, state in zip(dispatchers, states, strict=True):
            vars(dispatcher).clear()
            vars(dispatcher).update(state)


def forward(
    chunks: Sequence[Any],
    inputs: Sequence[torch.Tensor],
    take: Callable[[torch.Tensor, int], Any],
    inference_context: Any = None,
    positions: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> list[Any]:
    """Run some passes through the pipeline with Megatron's own schedule.

    Args:
        chunks: chunks of this rank.
        inputs: token ids of each pass, [N, S], all of one shape.
        take: function that gets the logits [N, S, V/T] and the number of a pass, and returns the part to keep. The
            function is called only on the last stage.
        inference_context: Megatron's cache of keys and values for generation, with the rows of all passes.
        positions: rows and places [P] of each pass whose logits are needed; the logits are then [1, P, V]. Fewer
            positions save time, because the output layer is a fifth of a small model's work. None means all positions.
            Positions are allowed only if sequences are not split.

    Returns:
        The results of `take`, one per pass; empty on all stages except the last.
    """
    from megatron.core.pipeline_parallel import get_forward_backward_func

    size, length = inputs[0].shape
    offset = inference_context.sequence_len_offset if inference_context else 0
    positions_NS = torch.arange(offset, offset + length, device=inputs[0].device).expand(size, length)
    mask = _causal_mask(offset, length, inputs[0].device)

    def step(numbered: Iterator[tuple[int, torch.Tensor]], chunk: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        number, tokens_NS = next(numbered)
        current[:] = [number]
        if inference_context:
            inference_context.batch_size_offset = number * size
        extra = {"inference_context": inference_context, "runtime_gather_output": True} if inference_context else {}
        output = chunk(tokens_NS, positions_NS, mask, **extra)
        return output, lambda logits, **_: take(logits, number)

    current: list[int] = []
    with _at_positions(chunks, positions, current):
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(enumerate(inputs)) for _ in chunks] if len(chunks) > 1 else iter(enumerate(inputs)),
            model=list(chunks),
            num_microbatches=len(inputs),
            seq_length=length * chunks[0].config.context_parallel_size,
            micro_batch_size=size,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return results


@contextmanager
def _at_positions(
    chunks: Sequence[Any], positions: Sequence[tuple[torch.Tensor, torch.Tensor]] | None, current: Sequence[int]
) -> Iterator[None]:
    """Let the output layer see only the positions of the current pass."""

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert positions is not None
        rows_P, places_P = positions[current[0]]
        return (args[0][places_P, rows_P][:, None], *args[1:])

    modules = [pair for chunk in chunks for pair in chunk.named_modules()] if positions is not None else []
    hooks = [module.register_forward_pre_hook(select) for name, module in modules if name.endswith("output_layer")]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def gathered(part: dict[int, Any]) -> dict[int, Any]:
    """Return the entries of all ranks in one dictionary."""
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, part)
    return {number: value for part in parts for number, value in part.items()}


def padded_length(length: int, chunk: Any) -> int:
    """Return the length to which rows are padded, so that the layout can split rows and FP8 kernels can multiply."""
    config = chunk.config
    parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
    parts *= 2 * config.context_parallel_size if config.context_parallel_size > 1 else 1
    parts *= 16 if getattr(config, "fp8", None) else 1
    return -(-length // parts) * parts


def _causal_mask(offset: int, length: int, device: torch.device) -> torch.Tensor | None:
    """Return the causal mask, [1, 1, S, offset + S]; None on a GPU, where Transformer Engine makes its own mask."""
    if device.type == "cuda":
        return None
    return torch.ones(length, offset + length, dtype=torch.bool, device=device).triu(offset + 1)[None, None]
