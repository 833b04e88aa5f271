"""Upcycling inside Megatron-Bridge: a hook that fills the chunks of a run that has no checkpoint of its own.

Bridge calls it on every start, after the chunks are built and before they get a `Float16Module`, a DDP and an
optimizer: master weights are made of what it filled in. Bridge loads Hugging Face weights at the same place.
"""

from __future__ import annotations

from collections import UserList
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.hybrid.hybrid_builder import HybridModelConfig
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.bridge.training.checkpointing import _has_global_non_persistent_checkpoint
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.utils.checkpoint_utils import checkpoint_exists, is_hf_checkpoint_dir
from megatron.training.models.base import ModelConfig

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.models.hybrid import hybrid_of
from nemo_upcycle.models.megatron_config import check_spec
from nemo_upcycle.online.receipt import read_receipt
from nemo_upcycle.online.start import fill_chunks, merge_receipts
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.validation import is_whole


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
        config: the run; changed in place. Its model is one of `nemo_upcycle.trainers.bridge.models`, or Bridge's own.
        dense: folder of the dense checkpoint, the same on all ranks.
        spec: how to upcycle it; None loads it into a dense model as it is (continued training of the parent).
        branches: further dense checkpoints of the same architecture (Branch-Train-MiX).
        non_expert_weights: with branches, where all other weights come from: the `first` checkpoint or the `mean`.

    Raises:
        SpecError: the configuration contradicts the spec, or would overwrite or lose what is filled in.

    Example:
        >>> config = my_pretraining()  # doctest: +SKIP
        >>> config.model = upcycled_provider("/models/Llama-3-8B", spec := UpcycleSpec(num_experts=8, top_k=2))
        >>> upcycle_on_start(config, "/models/Llama-3-8B", spec)
        >>> pretrain(config, forward_step)
    """
    config.tokenizer.use_tokenizer_vocab_size = False  # the dense checkpoint's vocabulary counts, not the tokenizer's
    _check(config, spec)
    model = config.model
    transformer = getattr(model, "transformer", model)
    transformer.perform_initialization = False  # it would be overwritten
    hook = UpcycleHook(config, spec, (Path(dense), *map(Path, branches)), non_expert_weights)
    if isinstance(model, ModelConfig):
        # No list: Bridge empties lists of functions when a command line changes settings, and leaves other sequences.
        model.pre_wrap_hooks = UserList([*model.pre_wrap_hooks, hook])
    else:
        model.register_pre_wrap_hook(hook)


@dataclass(frozen=True)
class UpcycleHook:
    """Fills the chunks of a run that has no checkpoint of its own; what Bridge calls.

    Args:
        config: the run.
        spec: see `upcycle_on_start`.
        paths: of the dense checkpoints, the parent's first.
        non_expert_weights: see there.
    """

    config: ConfigContainer
    spec: UpcycleSpec | None
    paths: tuple[Path, ...]
    non_expert_weights: str

    def check(self) -> None:
        """Check that the run can be filled and keeps what it was filled with.

        Raises:
            SpecError: it cannot, or does not.
        """
        _check(self.config, self.spec)

    def __call__(self, chunks: list[Any]) -> list[Any]:
        """Fill a rank's chunks, and write the receipt on the first rank."""
        self.check()  # again: settings from the command line come later than the recipe's
        if not _goes_on(self.config, self.paths[0], self.spec):
            merged = merge_receipts(fill_chunks(chunks, list(self.paths), self.spec, self.non_expert_weights))
            if merged:
                merged.write(Path(self.config.checkpoint.save) / RECEIPT)
            torch.distributed.barrier()
        return chunks


def hook_of(config: ConfigContainer) -> UpcycleHook | None:
    """Return what `upcycle_on_start` has registered in a run; None without it."""
    model = config.model
    hooks = model.pre_wrap_hooks if isinstance(model, ModelConfig) else getattr(model, "_pre_wrap_hooks", [])
    return next((hook for hook in hooks if isinstance(hook, UpcycleHook)), None)


def _check(config: ConfigContainer, spec: UpcycleSpec | None) -> None:
    """Check that the run can be filled and keeps what it was filled with."""
    model, checkpoint = config.model, config.checkpoint
    transformer = getattr(model, "transformer", model)
    hybrid = hybrid_of(model)
    if hybrid is None and isinstance(model, HybridModelConfig | HybridModelProvider):
        raise SpecError(
            field="config.model.hybrid_layer_pattern",
            got=None,
            expected="which layers the model has",
            fix="set it; hybrid_override_pattern and the ratios are older forms of it",
        )
    virtual = transformer.virtual_pipeline_model_parallel_size
    if hybrid:
        hybrid.require_stages(transformer.pipeline_model_parallel_size, virtual or 1)
    if spec:
        check_spec(transformer, spec, hybrid)
    elif experts := transformer.num_moe_experts:
        raise SpecError(field="config.model.num_moe_experts", got=experts, expected="none", fix="give a spec")
    if not checkpoint.save:
        raise SpecError(field="config.checkpoint.save", got=None, expected="a folder, for the receipt", fix="set it")
    if not checkpoint.load or Path(checkpoint.load) != Path(checkpoint.save):
        raise SpecError(
            field="config.checkpoint.load",
            got=checkpoint.load,
            expected=f"checkpoint.save, {checkpoint.save}: a restart would upcycle again",
            fix="set both",
        )
    if not is_whole(tensor := transformer.tensor_model_parallel_size, 1):
        raise SpecError(field="config.model.tensor_model_parallel_size", got=tensor, expected="1 or more", fix="set 1")
    if rest := (model.vocab_size or 0) % tensor:
        raise SpecError(
            field="config.model.vocab_size",
            got=model.vocab_size,
            expected=f"a multiple of TP: Bridge pads no vocabulary that is set ({rest} rows are over)",
            fix="give the model a vocab_size that TP divides: rows that only pad are filled with zeros",
        )
    is_local = checkpoint.non_persistent_ckpt_type == "local"
    for name, got, why in (
        ("checkpoint.pretrained_checkpoint", checkpoint.pretrained_checkpoint, "it would overwrite"),
        ("checkpoint.load", is_hf_checkpoint_dir(checkpoint.load) and checkpoint.load, "it would overwrite"),
        ("checkpoint.non_persistent_ckpt_type", is_local and "local", "no rank sees the others' checkpoints"),
        (
            "model.virtual_pipeline_model_parallel_size",
            isinstance(model, HybridModelProvider) and virtual,
            "Bridge's provider of a HybridModel has none; upcycled_config makes a builder's, which has",
        ),
        (
            "checkpoint.also_save_hf_checkpoint",
            hybrid and checkpoint.also_save_hf_checkpoint,
            "Bridge numbers a HybridModel's layers as they are; nemo-upcycle export writes the parent's class",
        ),
        ("peft", config.peft, "all weights are trained"),
        ("dist.use_megatron_fsdp", config.dist.use_megatron_fsdp or config.ddp.use_megatron_fsdp, "it cuts shards"),
        ("dist.use_torch_fsdp2", config.dist.use_torch_fsdp2, "it cuts shards"),
        ("dist.use_decentralized_pg", config.dist.use_decentralized_pg, "it has no parallel_state"),
        ("model.init_model_with_meta_device", model.init_model_with_meta_device, "there is nothing to fill"),
    ):
        if got:
            raise SpecError(field=f"config.{name}", got=got, expected=f"nothing: {why}", fix="unset it")


def _goes_on(config: ConfigContainer, dense: Path, spec: UpcycleSpec | None) -> bool:
    """Return whether the run has a checkpoint that Bridge is going to load; the first rank looks for all.

    Raises:
        UpcycleError: it has, and was not made as this one would be.
    """
    verdict: list[Any] = [None]
    if torch.distributed.get_rank() == 0:
        try:
            folder = config.checkpoint.load
            verdict[0] = checkpoint_exists(folder) or _has_global_non_persistent_checkpoint(folder, config.checkpoint)
            if verdict[0]:
                _check_receipt(Path(config.checkpoint.save) / RECEIPT, dense, spec)
                show_messages().info("%s: the run goes on from its checkpoint, nothing is upcycled", folder)
        except UpcycleError as error:
            verdict[0] = error
    torch.distributed.broadcast_object_list(verdict)
    if isinstance(verdict[0], UpcycleError):
        raise verdict[0]
    return bool(verdict[0])


def _check_receipt(path: Path, dense: Path, spec: UpcycleSpec | None) -> None:
    """Check that the run that goes on was made of this checkpoint, by this spec."""
    if not path.is_file():
        raise UpcycleError(
            str(path.parent),
            got="checkpoints without a receipt.json: they were not made by upcycling",
            expected="a new folder, or one of an upcycled run",
            fix="give config.checkpoint.save and .load another folder",
        )
    made = read_receipt(path)
    wanted = spec.to_dict() if spec else None
    for name, got, expected in (("spec", made.get("spec"), wanted), ("source", made.get("source"), str(dense))):
        if got != expected:
            raise UpcycleError(
                f"{path}: {name}", got=got, expected=expected, fix=f"go on with the same {name}, or in a new folder"
            )
