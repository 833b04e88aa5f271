"""NeMo or Megatron weights -> a Hugging Face folder, streamed, by the mapping table.

A dense model becomes its own class again, an upcycled one Mixtral, or Qwen2-MoE where Mixtral cannot hold it. Two
places to read from: a distributed checkpoint of any layout, and the chunk of a live one-rank model.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from nemo_upcycle.architecture import Architecture, read_architecture
from nemo_upcycle.errors import CheckpointError, SpecError, problem
from nemo_upcycle.files import MARKER, output_folder, require_apart, write_json
from nemo_upcycle.hf_folder import copy_companions, require_dtype, write_config, write_weights
from nemo_upcycle.mapping import BY_ROLE, MODEL_ROWS, Row, hf_constants, layer_rows, row_of_hf
from nemo_upcycle.slices import Shard, hf_shape, hf_shapes, pieces, shard_shape
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint, model_prefix
from nemo_upcycle.sources.megatron_checkpoint import model_tensors
from nemo_upcycle.spec import UpcycleSpec


#: Who made a folder, as its marker says: such a folder may be replaced by the next export.
MADE_BY = "nemo-upcycle export"
#: What is read before the mapped files' memory is given back: often enough to stay small, too seldom to cost time.
_RELEASE_BYTES = 256 << 20


class MegatronWeights(Protocol):
    """Whole Megatron parameters, by row, layer and expert."""

    def read(self, row: Row, layer: int, expert: int) -> torch.Tensor:
        """Return a parameter, gathered over tensor-parallel ranks; vocabularies may be padded."""


class CheckpointWeights:
    """Parameters of a distributed checkpoint.

    Args:
        folder: a NeMo checkpoint (with `weights/`) or a Megatron one (with `.metadata`).
    """

    def __init__(self, folder: Path) -> None:
        weights = folder / "weights"
        self.checkpoint = DistributedCheckpoint(weights if weights.is_dir() else folder)
        self._prefix = model_prefix(self.checkpoint)
        self._released_at_bytes = 0

    def _key(self, row: Row, layer: int) -> tuple[str, bool]:
        """Return the name of a row's tensor and whether its first axis counts layers."""
        for stored in row.stored:
            stacked = f"{self._prefix}decoder.layers.{stored}" if row.in_layer else self._prefix + stored
            if stacked in self.checkpoint.names():
                return stacked, row.in_layer
            single = f"{self._prefix}decoder.layers.{layer}.{stored}"
            if row.in_layer and single in self.checkpoint.names():
                return single, False
        raise CheckpointError(
            problem(
                f"{self.checkpoint.path}: {row.role} of layer {layer}",
                got="no such tensor",
                expected=" or ".join(row.stored),
                fix="export a checkpoint of a Llama-family model, dense or upcycled",
            )
        )

    @property
    def num_experts(self) -> int | None:
        """Experts per layer, or None for a dense model."""
        router = BY_ROLE["router"].stored[0]
        names = [name for name in model_tensors(self.checkpoint, self._prefix) if name.endswith(router)]
        return self.checkpoint.shape(names[0])[-2] if names else None

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        inside = self._prefix + "decoder.layers."
        for stored in BY_ROLE["attention_norm"].stored:
            if inside + stored in self.checkpoint.names():
                return self.checkpoint.shape(inside + stored)[0]
        found = (re.match(re.escape(inside) + r"(\d+)\.", name) for name in self.checkpoint.names())
        return 1 + max((int(match.group(1)) for match in found if match), default=-1)

    @property
    def tied_embeddings(self) -> bool:
        """Whether the model has no output layer of its own."""
        return self._prefix + BY_ROLE["output"].stored[0] not in self.checkpoint.names()

    def require_parent(self, arch: Architecture) -> None:
        """Check what the tensors that `arch` names would not show: layers and output weights that it does not have.

        Raises:
            CheckpointError: the model is not made from a parent of this architecture.
        """
        for what in ("num_layers", "tied_embeddings"):
            if (got := getattr(self, what)) != (expected := getattr(arch, what)):
                fix = "export with the dense parent that the model was made from"
                expected = f"{expected}, as in the dense parent"
                raise CheckpointError(
                    problem(f"{what} of {self.checkpoint.path}", got=got, expected=expected, fix=fix)
                )

    def require_all_read(self, arch: Architecture) -> None:
        """Check that the model holds nothing that an export as `arch` would leave out.

        Raises:
            CheckpointError: it does, or lacks a tensor of `arch`.
        """
        rows = [(row, 0) for row in MODEL_ROWS if row.role != "output" or not arch.tied_embeddings]
        rows += [(row, layer) for layer in range(arch.num_layers) for row in layer_rows(arch, layer)]
        read = {self._key(row, layer)[0] for row, layer in rows}
        if unread := sorted(set(model_tensors(self.checkpoint, self._prefix)) - read):
            raise CheckpointError(
                problem(
                    f"{self.checkpoint.path}: tensors that the export would leave out",
                    got=", ".join(unread[:3]) + (f" and {len(unread) - 3} more" if len(unread) > 3 else ""),
                    expected=f"the tensors of this {arch.hf_class or 'model'} alone",
                    fix="give the spec that it was upcycled by (as --shared-experts, --moe-layers) and its own parent",
                )
            )

    def read(self, row: Row, layer: int, expert: int) -> torch.Tensor:
        """Return a parameter, put together from the pieces of all ranks."""
        if self.checkpoint.bytes_read - self._released_at_bytes > _RELEASE_BYTES:
            self.checkpoint.release()
            self._released_at_bytes = self.checkpoint.bytes_read
        key, stacked = self._key(row, layer)
        position = ([layer] if stacked else []) + ([expert] if row.is_expert else [])
        shape = self.checkpoint.shape(key)
        index = [(at, at + 1) for at in position] + [(0, size) for size in shape[len(position) :]]
        return self.checkpoint.read(key, index).view(shape[len(position) :])


class LiveWeights:
    """Parameters of a live Megatron model that is whole on this rank (one chunk, no tensor or expert parallelism)."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters: dict[str, Any] = dict(model.named_parameters())

    def read(self, row: Row, layer: int, expert: int) -> torch.Tensor:
        """Return a parameter."""
        prefix = f"decoder.layers.{layer}." if row.in_layer else ""
        for template in row.megatron:
            if (name := prefix + template.format(expert=expert)) in self._parameters:
                return self._parameters[name].detach()
        raise CheckpointError(
            problem(
                f"{row.role} of layer {layer}", got="no such parameter", expected=row.megatron[-1], fix="use one rank"
            )
        )


def hf_reader(weights: MegatronWeights, arch: Architecture) -> Callable[[str], torch.Tensor]:
    """Return a function that gives the tensors of the Hugging Face model by name.

    Args:
        weights: where the Megatron parameters come from.
        arch: shapes of the Hugging Face model.
    """

    constants = hf_constants(arch)

    def read(hf_name: str) -> torch.Tensor:
        if hf_name in constants:
            return torch.zeros(constants[hf_name])
        row, part, layer, expert = row_of_hf(hf_name, arch)
        whole = weights.read(row, layer, expert)
        wanted = shard_shape(row, arch, Shard(), padded_vocab=max(whole.shape[0], arch.vocab_size))
        if tuple(whole.shape) != wanted:
            fix = "the checkpoint belongs to another dense parent"
            raise CheckpointError(
                problem(f"shape of {hf_name}", got=list(whole.shape), expected=list(wanted), fix=fix)
            )
        piece = next(piece for piece in pieces(row, arch, Shard(), wanted) if piece.part == part)
        tensor = piece.view(whole).reshape(hf_shape(row, part, arch))
        # Qwen2-MoE halves its shared expert, see `hf_constants`.
        return tensor * 2 if row.role == "shared_fc2" else tensor

    return read


def _no_class(arch: Architecture) -> str:
    """Return why no Hugging Face class can hold an MoE."""
    reasons = {
        "a Gemma: norms around zero": arch.zero_centered_norm,
        "a network without a gate": not arch.gated,
        "a bias of the attention's output": arch.attention_out_bias,
        "biases of the feed-forward network": arch.ffn_bias,
    }
    router = "sigmoid scores or a routed_scaling"
    if arch.num_heads * arch.head_dim != arch.hidden_size:
        router += ", or heads that do not make up the hidden size (Qwen2-MoE)"
    if arch.window:
        router += ", or a sliding window (Mixtral's alone) with shared experts, biases or dense layers (Qwen2-MoE's)"
    return next((reason for reason, holds in reasons.items() if holds), router)


def require_class(arch: Architecture) -> None:
    """Check that a Hugging Face class can hold a model.

    Raises:
        SpecError: none can.
    """
    if not arch.hf_class:
        fix = "keep the model in NeMo: it trains and evaluates there"
        if arch.window:
            fix += ", or set sliding_window to null in config.json if training sequences were no longer"
        expected = "what Mixtral or Qwen2-MoE can hold"
        raise SpecError(problem("Hugging Face class for this MoE", got=_no_class(arch), expected=expected, fix=fix))


def export_weights(
    weights: MegatronWeights,
    arch: Architecture,
    dense_folder: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    facts: dict[str, Any] | None = None,
) -> Path:
    """Write a Hugging Face folder; complete or not at all.

    Args:
        weights: where the Megatron parameters come from.
        arch: the model to write, dense or MoE.
        dense_folder: the parent, whose config and tokenizer travel along.
        output: the folder to make.
        dtype: type on disk.
        facts: what the success marker says besides the sizes.

    Raises:
        CheckpointError: the weights do not fit `arch`.
        UpcycleError: the disk has no room, `output` is there already and no earlier export, or is the parent.
    """
    require_class(arch)
    shapes = hf_shapes(arch)
    require_dtype(dtype)
    require_apart(output, dense_folder)
    output = output.resolve()
    with output_folder(output, MADE_BY) as folder:
        write_config(dense_folder, folder, arch, dtype)
        companions = copy_companions(dense_folder, folder)
        total_bytes = write_weights(folder, shapes, hf_reader(weights, arch), dtype, label=f"export {output.name}")
        sizes = {"tensors": len(shapes), "bytes": total_bytes, "companions": companions}
        marker = {"made_by": MADE_BY, **sizes, **(facts or {})}
        write_json(folder / MARKER, marker)
    return output


def export_checkpoint(
    checkpoint: Path,
    dense_folder: Path,
    output: Path,
    *,
    spec: UpcycleSpec | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Export a NeMo or Megatron checkpoint, saved under any layout, to a Hugging Face folder.

    Args:
        checkpoint: the checkpoint.
        dense_folder: the dense parent's Hugging Face folder.
        output: the folder to make.
        spec: what an MoE checkpoint was upcycled by.
        dtype: type on disk.

    Raises:
        SpecError: an MoE checkpoint without a spec, or one that no Hugging Face class can hold.
        CheckpointError: the checkpoint is damaged, belongs to another parent or holds what the spec does not say.
        UpcycleError: `output` is no earlier export, or not apart from checkpoint and parent.

    Example:
        >>> export_checkpoint(Path("last"), Path("dense"), Path("hf"), spec=UpcycleSpec())  # doctest: +SKIP
    """
    require_apart(output, checkpoint)
    weights = CheckpointWeights(checkpoint)
    arch = read_architecture(dense_folder)
    weights.require_parent(arch)
    if experts := weights.num_experts:
        if spec is None or spec.num_experts != experts:
            got = f"num_experts={spec.num_experts}" if spec else "none"
            fix = "give the spec that the model was upcycled by"
            raise SpecError(problem("spec", got=got, expected=f"num_experts={experts}, as in {checkpoint}", fix=fix))
        arch = arch.upcycled(spec)
    weights.require_all_read(arch)
    with weights.checkpoint:
        facts = {"checkpoint": checkpoint.name}
        return export_weights(weights, arch, dense_folder, output, dtype=dtype, facts=facts)
