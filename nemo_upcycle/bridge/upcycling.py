"""Upcycling inside Megatron-Bridge: a hook that fills the chunks of a run that has no checkpoint of its own.

Bridge calls it on every start, after the chunks are built and before they get a `Float16Module`, a DDP and an
optimizer: master weights are made of what it filled in. Bridge loads Hugging Face weights at the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.hybrid.hybrid_builder import HybridModelConfig
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.bridge.training.checkpointing import _has_global_non_persistent_checkpoint
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists
from megatron.training.models.base import ModelConfig

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.models.megatron_config import check_spec
from nemo_upcycle.online.receipt import read_receipt
from nemo_upcycle.online.upcycle import load_dense_into, upcycle_into
from nemo_upcycle.sources import open_dense
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.progress import ProgressLine, show_messages


RECEIPT = "receipt.json"


def upcycle_on_start(
    config: ConfigContainer,
    dense: str | Path,
    spec: UpcycleSpec | None,
    *,
    branches: Sequence[str | Path] = (),
    non_expert_weights: str = "first",
) -> None:
    """Let a run of Bridge's start from a dense checkpoint; call it last, when the configuration is complete.

    A run that has a checkpoint of its own goes on from it and reads nothing of the dense one. The receipt is written
    beside the checkpoints, as `receipt.json`, before the first of them.

    Args:
        config: the run; changed in place. Its model is one of `nemo_upcycle.bridge.models`, or Bridge's own.
        dense: folder of the dense checkpoint, the same on all ranks.
        spec: how to upcycle it; None loads it into a dense model as it is (continued training of the parent).
        branches: further dense checkpoints of the same architecture (Branch-Train-MiX).
        non_expert_weights: with branches, where all other weights come from: the `first` checkpoint or the `mean`.

    Raises:
        SpecError: the configuration contradicts the spec, or would overwrite or lose what is filled in.

    Example:
        >>> config = llama3_8b_pretrain_2gpu_h100_bf16_config()  # doctest: +SKIP
        >>> config.model = upcycled_provider("/models/Llama-3-8B", spec := UpcycleSpec(num_experts=8, top_k=2))
        >>> upcycle_on_start(config, "/models/Llama-3-8B", spec)
        >>> pretrain(config, forward_step)
    """
    _check(config, spec)
    model = config.model
    transformer = getattr(model, "transformer", model)
    transformer.perform_initialization = False  # it would be overwritten
    paths = [Path(dense), *map(Path, branches)]

    def fill(chunks: list[Any]) -> list[Any]:
        if _has_own_checkpoint(config):
            _check_receipt(config, paths[0], spec)
        else:
            _fill(chunks, paths, non_expert_weights, spec, Path(config.checkpoint.save) / RECEIPT)
        return chunks

    if isinstance(model, ModelConfig):
        model.pre_wrap_hooks.append(fill)
    else:
        model.register_pre_wrap_hook(fill)


def _check(config: ConfigContainer, spec: UpcycleSpec | None) -> None:
    """Check that the run can be filled and keeps what it was filled with."""
    model, checkpoint = config.model, config.checkpoint
    transformer = getattr(model, "transformer", model)
    if isinstance(model, HybridModelConfig | HybridModelProvider):
        raise SpecError(
            "config.model",
            got=type(model).__name__,
            expected="a GPT model: layers of a HybridModel have other names",
            fix="make it with nemo_upcycle.bridge.models",
        )
    if spec:
        check_spec(transformer, spec)
    elif experts := transformer.num_moe_experts:
        raise SpecError("config.model.num_moe_experts", got=experts, expected="none without a spec", fix="give a spec")
    for name, got, expected, fix in (
        ("checkpoint.save", checkpoint.save, "a folder: checkpoints and the receipt go there", "set it"),
        ("checkpoint.load", checkpoint.load, "checkpoint.save: a restart would upcycle again", "set it to the same"),
        ("checkpoint.pretrained_checkpoint", checkpoint.pretrained_checkpoint, "none: it would overwrite", "unset it"),
        ("peft", config.peft, "none", "train all weights"),
        ("dist.use_megatron_fsdp", config.dist.use_megatron_fsdp, "false: shards are cut there", "use TP, PP, EP"),
        ("dist.use_torch_fsdp2", config.dist.use_torch_fsdp2, "false: shards are cut there", "use TP, PP, EP"),
        ("model.init_model_with_meta_device", model.init_model_with_meta_device, "false", "build the weights"),
    ):
        is_folder = name.startswith("checkpoint.") and name.endswith(("save", "load"))
        if (is_folder and got != (checkpoint.save or "")) or (not is_folder and got):
            raise SpecError(f"config.{name}", got=got, expected=expected, fix=fix)


def _has_own_checkpoint(config: ConfigContainer) -> bool:
    """Return whether Bridge is going to load a checkpoint of this run."""
    folder = config.checkpoint.load
    return bool(checkpoint_exists(folder) or _has_global_non_persistent_checkpoint(folder, config.checkpoint))


def _check_receipt(config: ConfigContainer, dense: Path, spec: UpcycleSpec | None) -> None:
    """Check that the run that goes on was made as this one would be."""
    path = Path(config.checkpoint.save) / RECEIPT
    if not path.is_file():
        raise UpcycleError(
            f"{config.checkpoint.load}",
            got="checkpoints without a receipt.json: they were not made by upcycling",
            expected="a new folder, or one of an upcycled run",
            fix="give config.checkpoint.save and .load another folder",
        )
    made = read_receipt(path)
    wanted = spec.to_dict() if spec else None
    if made.get("spec") != wanted:
        raise UpcycleError(
            f"{path}: spec", got=made.get("spec"), expected=wanted, fix="go on with the same spec, or in a new folder"
        )
    if torch.distributed.get_rank() == 0:
        show_messages().info("%s: the run goes on from its own checkpoint, nothing is upcycled", path.parent)


def _fill(chunks: list[Any], paths: list[Path], non_expert_weights: str, spec: UpcycleSpec | None, path: Path) -> None:
    """Fill this rank's chunks; the first rank writes the receipt of all."""
    first = torch.distributed.get_rank() == 0
    total = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    with (
        open_dense(paths, non_expert_weights=non_expert_weights) as dense,
        ProgressLine("upcycle", total, enabled=first) as line,
    ):

        def progress(name: str, written_bytes: int) -> None:
            line.advance(written_bytes, note=name)

        if spec:
            receipt = upcycle_into(chunks, dense, spec, progress, hashes=True)
        else:
            receipt = load_dense_into(chunks, dense, progress)
    receipts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(receipts, receipt)
    if first:
        receipt.merge(receipts).write(path)
    torch.distributed.barrier()
