"""Checkpoints of models whose experts have gate and up rows interleaved (`moe_mlp_glu_interleave_size`)."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any


def store_contiguous() -> None:
    """Make Bridge store gate rows above up rows in this process, as Bridge itself claims to do.

    Bridge 0.6.2 interleaves rows when it loads them, and separates them when it saves them, except in a
    `ShardedTensorFactory`. In a `torch_dist` checkpoint, fc1 of every model is such a factory. Its rows are therefore
    saved interleaved, and a resumed run interleaves them twice. A function that is already wrapped is left unchanged.
    """
    from megatron.bridge.training import checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    process = checkpointing._process_state_dict_for_glu_interleaving
    if hasattr(process, "__wrapped__"):
        return

    @functools.wraps(process)
    def process_factories(state: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        factories = {key: value for key, value in state.items() if isinstance(value, ShardedTensorFactory)}
        done = process(state | {key: factory.data for key, factory in factories.items()}, *args, **kwargs)
        return done | {key: replace(factory, data=done[key]) for key, factory in factories.items()}

    checkpointing._process_state_dict_for_glu_interleaving = process_factories
