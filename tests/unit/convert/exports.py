"""Checkpoints to export: a small model saved under a layout, and random weights for any spec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.mapping import layer_mappings
from nemo_upcycle.models.mapping_table import MODEL_MAPPINGS
from nemo_upcycle.models.sharding import Shard, shard_shape
from nemo_upcycle.online.upcycle import load_dense_into
from tests.models import build_chunks


def _fill(folder: Path, *, moe: bool, layout: dict[str, int] | None = None) -> list[Any]:
    """Build this rank's chunks, and fill each expert with different weights."""
    chunks = build_chunks(folder, num_experts=4 if moe else None, layout=layout)
    with open_dense(folder) as source:
        if not moe:
            load_dense_into(chunks, source)
            return chunks
        upcycle_into(chunks, source, UpcycleSpec(num_experts=4, top_k=2, router_std=1.0))
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            first = layer.mlp.local_expert_indices[0]
            for number, expert in enumerate(layer.mlp.experts.local_experts):
                for parameter in expert.parameters():
                    parameter.data.mul_(1.0 + 0.125 * (first + number))
    return chunks


def save(folder: str, output: str, moe: bool, layout: dict[str, int], prefix: str) -> None:
    from megatron.core import dist_checkpointing

    (chunk,) = _fill(Path(folder), moe=moe, layout=layout)
    Path(output).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(chunk.sharded_state_dict(prefix=prefix), output)


def write_checkpoint(
    folder: Path, dense: Path, spec: UpcycleSpec | None, factor: float = 1.0, prefix: str = "module.", **extra: Any
) -> Path:
    """Write a random NeMo checkpoint, one layer at a time, with torch's writer; the weights' std is 0.1 * `factor`."""
    import torch.distributed.checkpoint as dcp

    arch = read_architecture(dense)
    moe_arch = arch.upcycled(spec) if spec else arch
    generator = torch.Generator().manual_seed(3)
    state: dict[str, Any] = {}
    layers = [(None, MODEL_MAPPINGS), *((n, layer_mappings(moe_arch, n)) for n in range(moe_arch.num_layers))]
    for layer, mappings in layers:
        for mapping in mappings:
            shape = shard_shape(mapping, moe_arch, Shard())
            shape = (moe_arch.num_experts, *shape) if mapping.is_expert else shape
            inside = "" if layer is None else f"decoder.layers.{layer}."
            state[prefix + inside + mapping.stored[0]] = torch.randn(shape, generator=generator) * 0.1 * factor
    (folder / "weights").mkdir(parents=True)
    dcp.save(state | extra, checkpoint_id=str(folder / "weights"), no_dist=True)
    return folder


@contextmanager
def _leaves_nothing(folder: Path, error: type[Exception] | tuple[type[Exception], ...], words: str) -> Iterator[None]:
    before = sorted(folder.rglob("*"))
    with pytest.raises(error, match=words):
        yield
    assert sorted(folder.rglob("*")) == before
