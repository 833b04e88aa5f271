"""Read whole parameters from a distributed checkpoint of any layout, or from a live Megatron model on one rank."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.hybrid import LayerPart, hybrid_of
from nemo_upcycle.models.mapping import layer_mappings, stored_hybrid
from nemo_upcycle.models.mapping_table import BY_ROLE, MODEL_MAPPINGS, ParamMapping
from nemo_upcycle.models.megatron_config import require_buildable
from nemo_upcycle.sources.checkpoint_context import CheckpointContext, read_context
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint, model_prefix
from nemo_upcycle.sources.megatron_checkpoint import model_tensors
from nemo_upcycle.spec import UpcycleSpec


#: Bytes to read before the memory of mapped files is released: small enough for memory, large enough for speed.
_RELEASE_BYTES = 256 << 20


class MegatronWeights(Protocol):
    """Whole Megatron parameters, by mapping, layer and expert."""

    def read(self, mapping: ParamMapping, layer: int, expert: int) -> torch.Tensor:
        """Return a parameter, gathered over tensor-parallel ranks. Vocabularies may be padded."""

    def dtype(self, mapping: ParamMapping, layer: int, expert: int) -> torch.dtype:
        """Return a parameter's type."""


class CheckpointWeights:
    """The parameters of a distributed checkpoint.

    Args:
        folder: a NeMo checkpoint (with `weights/`) or a Megatron checkpoint (with `.metadata`).
        adapters: checkpoint of LoRA adapters to these weights; by default, the adapters in `folder`, if there are any.
    """

    def __init__(self, folder: Path, adapters: Path | None = None) -> None:
        weights = folder / "weights"
        self.checkpoint = DistributedCheckpoint(weights if weights.is_dir() else folder)
        self._adapted = DistributedCheckpoint(adapters) if adapters else self.checkpoint
        self._prefix = model_prefix(self.checkpoint)
        own = [name.removeprefix(self._prefix) for name in model_tensors(self.checkpoint, self._prefix)]
        self._hybrid = stored_hybrid(own)
        self._released_at_bytes = 0
        #: Alpha of the LoRA adapters. The adapters are added to the weights with the factor alpha / rank.
        self.lora_alpha: float | None = None

    def _key(self, mapping: ParamMapping, layer: int, part: str = "") -> tuple[str, bool]:
        """Return the name of a mapping's tensor, or of one of its parts, and whether the first axis is the layer."""
        for stored in (stored + (part or mapping.stored_parts[0]) for stored in mapping.stored):
            stacked = f"{self._prefix}decoder.layers.{stored}" if mapping.in_layer else self._prefix + stored
            if stacked in self.checkpoint.names():
                return stacked, mapping.in_layer
            number = self._hybrid.index(LayerPart(layer, mapping.in_attention)) if self._hybrid else layer
            single = f"{self._prefix}decoder.layers.{number}.{stored}"
            if mapping.in_layer and single in self.checkpoint.names():
                return single, False
        raise CheckpointError(
            f"Checkpoint {self.checkpoint.path}",
            kind="missing",
            got=f"has no {mapping.role} of layer {layer} ({' or '.join(mapping.stored)})",
            fix="export a checkpoint of a Llama-family model, dense or upcycled",
        )

    @property
    def num_experts(self) -> int | None:
        """Number of experts per layer, or None for a dense model."""
        router = BY_ROLE["router"].stored[0]
        names = [name for name in model_tensors(self.checkpoint, self._prefix) if name.endswith(router)]
        return self.checkpoint.shape(names[0])[-2] if names else None

    @property
    def balancing_biases(self) -> dict[str, Any]:
        """For each role of balancing biases, whether the model has biases of this role."""
        names = list(model_tensors(self.checkpoint, self._prefix))
        return {role: any(name.endswith(BY_ROLE[role].stored) for name in names) for role in BALANCING_BIASES}

    @property
    def num_layers(self) -> int:
        """Number of layers of the model. For a HybridModel, the number of layers in the equivalent GPTModel."""
        if self._hybrid:
            return self._hybrid.num_layers
        inside = self._prefix + "decoder.layers."
        for stored in BY_ROLE["attention_out"].stored:
            if inside + stored in self.checkpoint.names():
                return self.checkpoint.shape(inside + stored)[0]
        found = (re.match(re.escape(inside) + r"(\d+)\.", name) for name in self.checkpoint.names())
        return 1 + max((int(match.group(1)) for match in found if match), default=-1)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the model has no separate output layer."""
        return self._prefix + BY_ROLE["output"].stored[0] not in self.checkpoint.names()

    def require_parent(self, arch: Architecture) -> None:
        """Check that the model has as many layers as `arch`, and a separate output layer only if `arch` has one.

        This check is needed, because an export reads only the tensors of `arch` and does not notice other tensors.

        Raises:
            CheckpointError: the model was not made from a parent of this architecture.
        """
        for what in ("num_layers", "tied_embeddings"):
            if (got := getattr(self, what)) != (expected := getattr(arch, what)):
                raise CheckpointError(
                    f"{what} of {self.checkpoint.path}",
                    got=got,
                    expected=f"{expected}, as in the parent",
                    fix="export with the model's own parent",
                )

    def require_all_read(self, arch: Architecture) -> None:
        """Check that an export as `arch` includes every tensor of the model.

        Raises:
            CheckpointError: the export leaves out a tensor, or the model lacks a tensor of `arch`.
        """
        mappings = [(mapping, 0) for mapping in MODEL_MAPPINGS if mapping.role != "output" or not arch.tied_embeddings]
        mappings += [(mapping, layer) for layer in range(arch.num_layers) for mapping in layer_mappings(arch, layer)]
        read = {self._key(mapping, layer, part)[0] for mapping, layer in mappings for part in mapping.stored_parts}
        read |= {name for key in read for name in self._adapters(key)}
        stored = {*model_tensors(self.checkpoint, self._prefix), *model_tensors(self._adapted, self._prefix)}
        if unread := sorted(stored - read):
            raise CheckpointError(
                f"Checkpoint {self.checkpoint.path}",
                kind="state",
                got="has tensors that the export would omit: "
                + ", ".join(unread[:3])
                + (f" and {len(unread) - 3} more" if len(unread) > 3 else ""),
                fix="give the spec of the upcycling (such as --shared-experts, --moe-layers) and the right parent",
            )

    def dtype(self, mapping: ParamMapping, layer: int, expert: int) -> torch.dtype:
        """Return a parameter's type."""
        return self.checkpoint.dtype(self._key(mapping, layer)[0])

    def read(self, mapping: ParamMapping, layer: int, expert: int) -> torch.Tensor:
        """Return a parameter, assembled from the pieces of all ranks."""
        if self.checkpoint.bytes_read - self._released_at_bytes > _RELEASE_BYTES:
            self.checkpoint.release()
            self._released_at_bytes = self.checkpoint.bytes_read
        if len(mapping.stored_parts) > 1:
            keys = (self._key(mapping, layer, part)[0] for part in mapping.stored_parts)
            return torch.cat([_read(self.checkpoint, key, []) for key in keys])
        key, stacked = self._key(mapping, layer)
        position = ([layer] if stacked else []) + ([expert] if mapping.is_expert else [])
        weight = _read(self.checkpoint, key, position)
        if adapters := self._adapters(key):
            # Grouped experts share one adapter.
            own = position[: len(self._adapted.shape(adapters[0])) - 2]
            out, into = (_read(self._adapted, name, own).float() for name in adapters)
            if self.lora_alpha is None:
                raise CheckpointError(
                    adapters[0],
                    kind="missing",
                    got="is a LoRA adapter, and nothing describes its alpha",
                    fix="copy the checkpoint again, with context/model.yaml or Bridge's run_config.yaml",
                )
            weight = (weight.float() + self.lora_alpha / into.shape[0] * out @ into).to(weight.dtype)
        return weight

    def _adapters(self, key: str) -> list[str]:
        """Return the names of a weight's two LoRA matrices, the outer matrix first, or [] if there is no adapter."""
        names = [f"{key.removesuffix('weight')}adapter.linear_{part}.weight" for part in ("out", "in")]
        return names if names[0] in self._adapted.names() else []


def _read(checkpoint: DistributedCheckpoint, key: str, position: list[int]) -> torch.Tensor:
    """Read the part of a tensor at a position on its first axes."""
    shape = checkpoint.shape(key)
    index = [(at, at + 1) for at in position] + [(0, size) for size in shape[len(position) :]]
    return checkpoint.read(key, index).view(shape[len(position) :])


def open_checkpoint(
    checkpoint: Path, dense_folder: Path, spec: UpcycleSpec | None
) -> tuple[CheckpointWeights, Architecture, CheckpointContext | None]:
    """Open a checkpoint and determine the architecture of its model.

    Args:
        checkpoint: checkpoint of NeMo or Megatron, saved under any layout.
        dense_folder: Hugging Face folder of the dense parent.
        spec: how an MoE checkpoint was upcycled; by default, the spec in the checkpoint's own context.

    Returns:
        The open weights, the model's architecture, and the checkpoint's description of the model (None if the
        checkpoint has no description).

    Raises:
        SpecError: an MoE checkpoint has no spec, a dense checkpoint has a spec, or the spec contradicts the
            checkpoint's context.
        CheckpointError: the checkpoint is damaged, belongs to another parent, or was trained with other settings.
    """
    context = read_context(checkpoint)
    base = context.settings.get("lora_base") if context else None
    weights = CheckpointWeights(_newest(Path(base)), checkpoint) if base else CheckpointWeights(checkpoint)
    arch = read_architecture(dense_folder)
    require_buildable(arch)
    weights.require_parent(arch)
    if context:
        context.require_parent(arch, dense_folder)
        spec = context.spec(spec, arch)
        weights.lora_alpha = context.settings.get("lora_alpha")
    if experts := weights.num_experts:
        is_parents = spec is None and experts == arch.num_experts  # trained without upcycling
        if not is_parents and (spec is None or spec.num_experts != experts):
            raise SpecError(
                "spec",
                got=f"num_experts={spec.num_experts}" if spec else "missing",
                expected=f"num_experts={experts}, as in {checkpoint}",
                fix="give the spec of the upcycling",
            )
        arch = replace(arch.upcycled(spec) if spec else arch, **weights.balancing_biases)
        if arch.quantile_bias:
            arch = replace(arch, hf_class="")  # every class adds balancing biases to scores, not to logits
    elif spec is not None:
        raise SpecError(
            f"Checkpoint {checkpoint}",
            kind="refused",
            got="is a dense model, which has no spec",
            fix="omit the options of the spec",
        )
    return weights, arch, context


def _newest(run: Path) -> Path:
    """Return the newest checkpoint of a run. Bridge's LoRA adapters are added to the weights of this checkpoint.

    Raises:
        CheckpointError: the run has no checkpoint.
    """
    if found := newest_checkpoint(run):
        return found
    raise CheckpointError(
        f"Run {run}",
        kind="missing",
        got="has no checkpoint, but the LoRA adapters need its weights (checkpoint.pretrained_checkpoint)",
        fix="move the run back to this folder",
    )


class LiveWeights:
    """Parameters of a live Megatron model that is whole on this rank (one chunk, no tensor or expert parallelism)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._hybrid = model, hybrid_of(model)
        self._names = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}

    def dtype(self, mapping: ParamMapping, layer: int, expert: int) -> torch.dtype:
        """Return a parameter's type."""
        return self._tensor(mapping, layer, expert).dtype

    def read(self, mapping: ParamMapping, layer: int, expert: int) -> torch.Tensor:
        """Return a parameter."""
        return self._tensor(mapping, layer, expert).detach()

    def _tensor(self, mapping: ParamMapping, layer: int, expert: int) -> torch.Tensor:
        owner, _, name = self.name(mapping, layer, expert).rpartition(".")
        tensor: torch.Tensor = getattr(self._model.get_submodule(owner), name)  # biases are buffers
        return tensor

    def name(self, mapping: ParamMapping, layer: int, expert: int) -> str:
        """Return a parameter's name in the model."""
        number = self._hybrid.index(LayerPart(layer, mapping.in_attention)) if self._hybrid else layer
        prefix = f"decoder.layers.{number}." if mapping.in_layer else ""
        names = (prefix + template.format(expert=expert) for template in mapping.megatron)
        return next(name for name in names if name in self._names)
