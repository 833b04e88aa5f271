"""Saves checkpoints of models that were upcycled on several ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.models.hf_config import read_architecture
from tests.models import build_chunks, moe_settings


def save_upcycled(folder: str, output: str, spec: UpcycleSpec, layout: dict[str, int], fields: Any = None) -> None:
    """Save an untrained upcycled model. If it has balancing biases and its parent has none, set them to nonzero."""
    from megatron.core import dist_checkpointing

    with open_dense(folder) as dense:
        settings = moe_settings(dense.architecture, spec) | (fields or {})
        (chunk,) = build_chunks(dense.architecture, layout=layout, **settings)
        upcycle_into([chunk], dense, spec)
    for name, bias in chunk.named_buffers():
        if name.endswith("expert_bias") and not read_architecture(Path(folder)).balancing_bias:
            assert not bias.any()
            bias.copy_(torch.linspace(-0.3, 0.4, bias.numel()).roll(int(name.split(".")[2])))
    Path(output).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(chunk.sharded_state_dict(prefix="module."), output)
