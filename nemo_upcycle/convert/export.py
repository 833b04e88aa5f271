"""Stream NeMo or Megatron weights into a Hugging Face folder, under the names in the mapping table.

A dense model is exported to its own class. An upcycled model is exported to the first target class that can hold the
model. The export refuses a parent or a spec that contradicts the model's description in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.convert.hf_folder import copy_tokenizer_files, write_config
from nemo_upcycle.convert.megatron_weights import MegatronWeights, open_checkpoint
from nemo_upcycle.convert.model_card import CardText, write_card
from nemo_upcycle.convert.safetensors_writer import (
    MAX_SHARD_BYTES,
    SafetensorsWriter,
    WriteTensors,
    as_bytes,
    require_dtype,
)
from nemo_upcycle.convert.whole import Whole, unseen_because
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.compatibility import Written, caveats, load_options
from nemo_upcycle.models.families import require_class
from nemo_upcycle.models.mapping import (
    as_written,
    constant_tensors,
    hf_constants,
    mapping_of_hf,
    stored_as,
)
from nemo_upcycle.models.sharding import Shard, float32_names, hf_parts, hf_shapes, shard_shape
from nemo_upcycle.models.stacked import as_in_file
from nemo_upcycle.models.tokenizer_files import check_tokenizer
from nemo_upcycle.package_info import __version__
from nemo_upcycle.sources.base import left_out, left_out_text
from nemo_upcycle.sources.checks import require_finite, rounded, rounded_by_folding
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.dtypes import dtype_name
from nemo_upcycle.utils.files import MODEL_MARKER, output_folder, require_apart, sha256_file, write_json
from nemo_upcycle.utils.streams import StreamedFile


#: Maker of a folder, as recorded in the folder's marker. An export replaces only folders with this maker.
MADE_BY = "nemo-upcycle export"
_ASSUMED = (
    "the checkpoint does not describe its model (no context/model.yaml, no arguments in common.pt): rotary embedding,"
    " norm epsilon, activation and window are assumed to be the parent's, and the router's scores a softmax"
)


@dataclass(frozen=True)
class CardInfo:
    """Facts about a model besides its weights.

    Args:
        title: name of the model; None uses the folder's name.
        facts: rows of the model card on upcycling, data and training.
        router_aux_loss: coefficient of the load-balancing loss in training; None if unknown.
        notes: sentences on what is inexact, unknown or assumed.
        checkpoint: name of the checkpoint.
        parent: the user's name for the dense parent: `asset://NAME`, or a path.
        text_only: whether to leave out the parts outside the parent's text model, even if a class could hold them.
    """

    title: str | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    router_aux_loss: float | None = None
    notes: tuple[str, ...] = ()
    checkpoint: str | None = None
    parent: str | None = None
    text_only: bool = False


def _write_tensors(weights: MegatronWeights, arch: Architecture, dtype: torch.dtype) -> WriteTensors:
    """Return a function that writes the tensors of a file, with one tensor in memory at a time.

    Raises:
        CheckpointError: a tensor has another shape than in the architecture, or holds NaN, infinity or a number too
            large for the type. Only the returned function raises this error.
    """
    constants, float32 = constant_tensors(arch, dtype), float32_names(arch)

    def write(file: StreamedFile, names: list[str], advance: Callable[[int], None]) -> None:
        for name in names:
            tensor = constants[name] if name in constants else _hf_tensor(weights, name, arch)
            cast = tensor.to(torch.float32 if name in float32 else dtype)
            require_finite(tensor, name, made=cast)
            file.write(as_bytes(as_in_file(name, cast)))
            advance(1)

    return write


def _hf_tensor(weights: MegatronWeights, hf_name: str, arch: Architecture) -> torch.Tensor:
    """Return a tensor of the Hugging Face model."""
    mapping, part, layer, expert = mapping_of_hf(hf_name, arch)
    stored = stored_as(mapping, arch)
    whole = weights.read(stored, layer, expert)
    wanted = shard_shape(stored, arch, Shard(), padded_vocab=max(whole.shape[0], arch.vocab_size))
    if tuple(whole.shape) != wanted:
        raise CheckpointError(
            f"shape of {hf_name}", got=list(whole.shape), expected=list(wanted), fix="give the checkpoint's own parent"
        )
    parts = [found for number, found in hf_parts(whole, mapping, arch).items() if number in mapping.together(part)]
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    tensor = tensor + mapping.hf_offset if mapping.hf_offset else tensor
    factor = mapping.hf_factors[part]
    return tensor if factor == 1.0 else tensor * factor


def export_weights(
    weights: MegatronWeights,
    arch: Architecture,
    dense_folder: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    about: CardInfo | None = None,
    plan: dict[str, Any] | None = None,
) -> Path:
    """Write a Hugging Face folder, completely or not at all.

    Args:
        weights: source of the Megatron parameters.
        arch: architecture of the model to write, dense or MoE.
        dense_folder: folder of the parent; its config and tokenizer go into the new folder.
        output: folder to create.
        dtype: type on disk.
        about: further facts about the model.
        plan: everything that determines the output, as plain values. If given, files of a killed call with the same
            plan are kept.

    Raises:
        CheckpointError: the weights do not fit `arch`.
        UpcycleError: the disk has too little space, `output` is the parent, or `output` exists and is not an earlier
            export.
    """
    about = about or CardInfo()
    require_class(arch)
    require_dtype(dtype)
    require_apart(output, dense_folder)
    check_tokenizer(dense_folder)
    output = output.resolve()
    whole = None if about.text_only or not arch.num_experts else Whole.of_folder(dense_folder, arch)
    arch = whole.moe_arch if whole else arch
    shapes, constants = hf_shapes(as_written(arch)), hf_constants(arch)
    stored = {}
    for name in (name for name in shapes if name not in constants):
        mapping, _, layer, expert = mapping_of_hf(name, arch)
        stored[name] = weights.dtype(stored_as(mapping, arch), layer, expert)
    float32 = float32_names(arch)
    lossy = list(rounded({name: own for name, own in stored.items() if name not in float32}, dtype))
    lossy += rounded_by_folding(arch, dtype)
    wrapper = whole.wrapper if whole else None
    copied = {"Copied as they are": left_out_text(left_out(whole.others))} if whole else {}
    if plan is not None and whole:
        plan = plan | {"sees": True}
    with output_folder(output, MADE_BY, plan) as folder:
        write_config(dense_folder, folder, arch, dtype, about.router_aux_loss, wrapper=wrapper)
        tokenizer_files = copy_tokenizer_files(dense_folder, folder, sees=whole is not None)
        writer = SafetensorsWriter(shapes, dtype, MAX_SHARD_BYTES, float32=float32, whole=whole)
        writer.write(folder, _write_tensors(weights, arch, dtype), f"export {output.name}")
        notes = [*about.notes, *caveats(Written(arch, dtype.itemsize, wrapper.hf_class if wrapper else ""))]
        if arch.num_experts and not about.text_only and (why := unseen_because(dense_folder, arch)):
            notes.append(f"only the text model: {why}")
        card = CardText(
            title=about.title or output.name,
            tool=MADE_BY,
            facts={"Type": dtype_name(dtype), **about.facts} | copied,
            notes=[*lossy, *notes],
            parent=about.parent,
            options=load_options(arch, dtype.itemsize),
        )
        write_card(folder, [dense_folder], arch, card, whole_class=wrapper.hf_class if wrapper else "")
        marker = {
            "made_by": MADE_BY,
            "version": __version__,
            "checkpoint": about.checkpoint,
            "tensors": writer.tensors,
            "bytes": writer.total_bytes,
            "dtype": dtype_name(dtype),
            "rounded": lossy,
            "notes": notes,
            "facts": dict(about.facts),
            "companions": tokenizer_files,
        }
        write_json(folder / MODEL_MARKER, marker)
    return output


def export_checkpoint(
    checkpoint: Path,
    dense_folder: Path,
    output: Path,
    *,
    spec: UpcycleSpec | None = None,
    dtype: torch.dtype = torch.bfloat16,
    about: CardInfo | None = None,
) -> Path:
    """Export a NeMo or Megatron checkpoint of any layout to a Hugging Face folder.

    If the process is killed, a new call with the same arguments continues with the first missing file.

    Args:
        checkpoint: checkpoint folder.
        dense_folder: Hugging Face folder of the dense parent.
        output: folder to create.
        spec: how an MoE checkpoint was upcycled; by default, the spec in the checkpoint's own context.
        dtype: type on disk.
        about: information for the model card, in addition to the information in the checkpoint.

    Raises:
        SpecError: an MoE checkpoint has no spec, a dense checkpoint has a spec, the spec contradicts the checkpoint's
            own context, or no Hugging Face class can hold the model.
        CheckpointError: the checkpoint is damaged, belongs to another parent, was trained with settings that differ
            from the parent's settings, or holds tensors that the spec does not explain.
        UpcycleError: `output` exists and is not an earlier export, or overlaps with the checkpoint or the parent.

    Example:
        >>> export_checkpoint(Path("last"), Path("dense"), Path("hf"), spec=UpcycleSpec())  # doctest: +SKIP
    """
    require_apart(output, checkpoint)
    weights, arch, context = open_checkpoint(checkpoint, dense_folder, spec)
    weights.require_all_read(arch)
    about = replace(
        about or CardInfo(),
        router_aux_loss=context.router_aux_loss if context else None,
        notes=context.notes if context else (_ASSUMED,),
        checkpoint=checkpoint.name,
    )
    plan = {
        "checkpoint": str(checkpoint.resolve()),
        "files": weights.checkpoint.fingerprint(),
        # Two checkpoints of one run have files of the same sizes, so the time tells the checkpoints apart.
        "written_ns": (weights.checkpoint.path / ".metadata").stat().st_mtime_ns,
        "config_sha256": sha256_file(dense_folder / "config.json"),
        "architecture": asdict(arch),
        "dtype": str(dtype),
        "version": __version__,
    }
    with weights.checkpoint:
        return export_weights(weights, arch, dense_folder, output, dtype=dtype, about=about, plan=plan)
