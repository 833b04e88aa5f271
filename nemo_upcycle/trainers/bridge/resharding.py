"""Resume a Bridge run under another layout than the layout of its last checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from megatron.bridge.training.checkpointing import get_checkpoint_train_state_filename
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.utils.checkpoint_utils import (
    checkpoint_exists,
    get_checkpoint_name,
    get_checkpoint_run_config_filename,
    read_run_config,
    read_train_state,
)
from megatron.core import dist_checkpointing, parallel_state
from torch.distributed.checkpoint import FileSystemReader

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.resharding import load_other_chains
from nemo_upcycle.utils.progress import show_messages


_SIZES = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}


def fit_layout(config: ConfigContainer) -> None:
    """Let a run load its last checkpoint, whatever the checkpoint's layout.

    Random states are saved for each rank. If the checkpoint has another layout, the random states are not loaded, and
    a message says so.

    Args:
        config: configuration of a run that has a checkpoint; changed in place.

    Raises:
        SpecError: the optimizer's states were saved in a form that does not fit another layout.
    """
    load_other_chains()
    checkpoint = config.checkpoint
    if not checkpoint_exists(checkpoint.load) or "://" in checkpoint.load:
        return  # the checkpoint is non-persistent (only this job reads it), or is in an object store
    folder = checkpoint_to_load(config)
    saved = read_run_config(get_checkpoint_run_config_filename(folder))
    before, now = _layout(saved["model"]), _layout(vars(config.model))
    form = (dist_checkpointing.load_content_metadata(folder) or {}).get("distrib_optim_sharding_type")
    if before != now and checkpoint.load_optim and form == "dp_reshardable":
        changed = ", ".join(f"{name} {now[name]}" for name in now if before[name] != now[name])
        was = ", ".join(f"{name} {before[name]}" for name in now if before[name] != now[name])
        raise SpecError(
            field="config.model",
            kind="refused",
            got=f"has {changed}, and the optimizer states of {folder} fit only {was}",
            fix=(
                "continue with the old layout and config.checkpoint.dist_ckpt_optim_fully_reshardable=True: the next "
                "checkpoint then fits every layout. Or set config.checkpoint.load_optim=False to start with new states"
            ),
        )
    if checkpoint.load_rng and not _has_random_numbers(folder):
        checkpoint.load_rng = False
        if torch.distributed.get_rank() == 0:
            show_messages().info("%s has another layout, so random numbers start again", folder)


def checkpoint_to_load(config: ConfigContainer) -> str:
    """Return the folder of the checkpoint that Bridge will load: `ckpt_step` if it is set, else the last one."""
    checkpoint = config.checkpoint
    latest = get_checkpoint_train_state_filename(checkpoint.load, "latest")
    folder: str = get_checkpoint_name(checkpoint.load, checkpoint.ckpt_step or read_train_state(latest).step)
    return folder


def _layout(model: dict[str, Any]) -> dict[str, int]:
    """Read a layout from the fields of a model; a builder's model has some of these fields in its `transformer`."""
    transformer = model.get("transformer") or {}
    inner = transformer if isinstance(transformer, dict) else vars(transformer)
    sizes = {name: model.get(field, inner.get(field)) or 1 for name, field in _SIZES.items()}
    if not model.get(_SIZES["ETP"], inner.get(_SIZES["ETP"])):
        sizes["ETP"] = sizes["TP"]  # Megatron's default
    return sizes


def _has_random_numbers(folder: str) -> bool:
    """Return whether the checkpoint has random states for the same ranks; only the first rank looks."""
    found = [False]
    if torch.distributed.get_rank() == 0:
        sizes = [
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
        ]
        if parallel_state.get_expert_model_parallel_world_size() > 1:
            sizes.append(parallel_state.get_data_parallel_world_size(with_context_parallel=True))
        names = FileSystemReader(folder).read_metadata().state_dict_metadata
        ending = "_" + ".".join(map(str, sizes))
        found = [any(name.startswith("rng_state/shard_") and name.endswith(ending) for name in names)]
    torch.distributed.broadcast_object_list(found)
    return found[0]
