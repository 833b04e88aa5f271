"""Convert a dense checkpoint to an upcycled Hugging Face folder, without a training job.

The result is bit-identical to upcycling in a training job and exporting afterwards. Every output file gets its final
name only when it is complete and on disk. So if a conversion is stopped, the next call continues with the first
missing file. `expansion.py` makes the tensors.
"""

from __future__ import annotations

import errno
import math
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.convert.expansion import Expansion
from nemo_upcycle.convert.hf_folder import copy_tokenizer_files, tokenizer_file_names, write_config
from nemo_upcycle.convert.model_card import CardText, spec_fact, write_card
from nemo_upcycle.convert.safetensors_writer import MAX_SHARD_BYTES, SafetensorsWriter, require_dtype
from nemo_upcycle.convert.whole import Whole, unseen_because
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.init.calibration_file import calibration_of
from nemo_upcycle.models.compatibility import Written, caveats, load_options
from nemo_upcycle.models.growth import inexact_because, needs_float32_routing
from nemo_upcycle.models.mapping import extra_params, mapping_of
from nemo_upcycle.models.tokenizer_files import check_tokenizer
from nemo_upcycle.models.wrapper import INDEX
from nemo_upcycle.package_info import __version__
from nemo_upcycle.sources.base import DenseSource, left_out, left_out_text
from nemo_upcycle.sources.checks import BrokenWeights, check_source, rounded_because
from nemo_upcycle.spec import UpcycleSpec, without_defaults
from nemo_upcycle.utils.dtypes import dtype_name
from nemo_upcycle.utils.files import (
    MODEL_MARKER,
    aside_of,
    clear,
    forget_work,
    is_complete,
    only_writer,
    read_json,
    require_apart,
    require_disk,
    resolved,
    sha256_file,
    write_json,
)


_PLAN = ".conversion.json"
#: Errors that a file system may raise during the conversion, each with its text in the message.
_FULL = {
    errno.ENOSPC: "is full",
    errno.EDQUOT: "has no quota left",
    errno.EFBIG: "does not allow a file of this size (see `ulimit -f`, or lower --max-shard-size)",
}


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`. `bytes_written`, `bytes_read` and `seconds` count only this call.

    `files_kept` is the number of finished files that the call found. The call recognises finished files by size and
    header, and does not read them again. `exact` says whether the model should compute its parent's function. `prove`
    checks `exact` by running the model. If the model needs routing in float32, `exact` assumes routing in float32.
    """

    output: Path
    hf_class: str
    dtype: str
    exact: bool
    inexact_because: tuple[str, ...]
    dense_params: int
    total_params: int
    active_params: int
    tensors: int
    files: int
    files_kept: int
    bytes_total: int
    bytes_written: int
    bytes_read: int
    max_shard_bytes: int
    needs_float32_routing: bool
    caveats: tuple[str, ...]
    left_out: dict[str, dict[str, int]]
    unseen_because: str
    seconds: float
    peak_rss_gib: float


def convert(
    dense: DenseSource,
    output: Path,
    spec: UpcycleSpec,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    text_only: bool = False,
    progress: bool = True,
) -> Conversion:
    """Upcycle a dense checkpoint into a Hugging Face folder, which is written completely or not at all.

    The result is bit-identical to `upcycle_into` in a model of the same type, followed by an export. Unfinished work
    is in a hidden folder beside `output`. A later call with the same source and spec keeps the finished files in the
    hidden folder.

    Args:
        dense: open dense checkpoint, whose folder also has config and tokenizer.
        output: folder to create.
        spec: how to upcycle the checkpoint.
        dtype: type of the weights on disk; None for the source's type. The weights are also scaled and changed in this
            type.
        max_shard_bytes: largest size of a file (bytes).
        text_only: whether to leave out the parts outside the parent's text model, even if a class could hold them.
        progress: whether to show progress on stderr.

    Returns:
        Counts, bytes, time, and whether the model computes its parent's function.

    Raises:
        SpecError: the spec does not fit, or no Hugging Face class can hold the model. Nothing was written.
        CheckpointError: the source is damaged, holds NaN or infinity, or does not fit its `config.json`.
        UpcycleError: `output` exists and is damaged or has another origin, another process is writing `output`,
            weights of this type cannot be written, or the disk is full.

    Example:
        >>> with open_dense("models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     convert(dense, Path("models/Llama-3-8B-E8T2"), UpcycleSpec(num_experts=8, top_k=2))
    """
    start_s, bytes_before = time.monotonic(), dense.bytes_read
    output = resolved(output)
    require_apart(output, *(source.path for source in dense.branches()))
    require_dtype(dtype := dtype or dense.dtype(mapping_of("embedding", dense.architecture).hf[0]))
    _check_folder(dense)
    whole = None if text_only else Whole.of(dense, dense.architecture.upcycled(spec))
    expansion = Expansion(dense, spec, dtype, whole)
    moe_arch = expansion.moe_arch
    if not is_complete(output) and not aside_of(output).exists():  # in other cases, the writer checks the disk
        # This check comes before names are listed, because listing takes long if there are very many experts.
        require_disk(
            output,
            (moe_arch.total_params + extra_params(moe_arch)) * dtype.itemsize + (whole.size_bytes if whole else 0),
            f"convert {output.name}",
        )
    writer = SafetensorsWriter(expansion.shapes, dtype, max_shard_bytes, expansion.order, expansion.float32, whole)
    check_source(dense)
    plan = _plan_of(dense, spec, dtype, max_shard_bytes) | ({"sees": True} if whole else {})
    reasons = (
        *inexact_because(dense.architecture, spec),
        *dense.inexact_because(),
        *rounded_because(dense, dtype, spec, written=moe_arch),
    )
    kept, written_bytes = len(writer.files), 0
    if _is_done(output, plan):
        _check_done(output, writer)
        _add_tokenizer_files(dense.path, output, sees=whole is not None)
        forget_work(output, _PLAN)
    else:
        with _only_writer(output, plan) as folder:
            label, writers = f"convert {output.name}", expansion.writers
            kept, written_bytes = writer.write(
                folder, expansion.write_tensors, label, writers=writers, progress=progress
            )
            _finish(expansion, writer, folder, output.name, reasons, plan)
    tied = "lm_head.weight" if moe_arch.tied_embeddings else ()  # a copy of the embedding
    total_params = sum(math.prod(shape) for name, shape in expansion.shapes.items() if not name.endswith(tied))
    return Conversion(
        output=output,
        hf_class=whole.wrapper.hf_class if whole else moe_arch.hf_class,
        dtype=dtype_name(dtype),
        exact=not reasons,
        inexact_because=reasons,
        dense_params=dense.architecture.total_params,
        total_params=total_params,
        active_params=total_params - moe_arch.total_params + moe_arch.active_params,
        tensors=writer.tensors,
        files=len(writer.files),
        files_kept=kept,
        bytes_total=writer.total_bytes,
        bytes_written=written_bytes,
        bytes_read=dense.bytes_read - bytes_before,
        max_shard_bytes=max_shard_bytes,
        needs_float32_routing=needs_float32_routing(dense.architecture, spec),
        caveats=_caveats(expansion),
        left_out=left_out(other for other in dense.others() if whole is None or other not in whole.others),
        unseen_because="" if text_only else unseen_because(dense.path, moe_arch),
        seconds=round(time.monotonic() - start_s, 3),
        peak_rss_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    )


def _check_folder(dense: DenseSource) -> None:
    """Check for config and tokenizer at the start, although they are needed only at the end.

    Only Hugging Face folders have these files beside the weights.
    """
    if not (dense.path / "config.json").is_file():
        raise CheckpointError(
            str(dense.path),
            kind="missing",
            got="has no config.json, so it is not a Hugging Face folder",
            fix="export the checkpoint first (nemo-upcycle export), then convert that",
        )
    tokenizer_file_names(dense.path)
    check_tokenizer(dense.path)


@contextmanager
def _only_writer(output: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """Lock and yield the working folder, with the finished files of a stopped run if the run had the same plan."""
    with only_writer(output) as aside:
        try:
            if not (aside / _PLAN).is_file() or read_json(aside / _PLAN) != plan:
                clear(aside)
                write_json(aside / _PLAN, plan)
            yield aside
        except BaseException as error:
            # Files made from a broken source are useless. After a file system error, a later call uses the finished
            # files.
            if isinstance(error, BrokenWeights) or not any(aside.glob("*.safetensors")):
                shutil.rmtree(aside)
            if not isinstance(error, OSError) or error.errno not in _FULL:
                raise
            raise UpcycleError(
                f"The disk of {output}",
                kind="state",
                got=_FULL[error.errno],
                fix="correct that, and run the same command again: finished files are kept",
            ) from None
    forget_work(output, _PLAN)  # only after the final rename, because files without a plan are not kept


def _finish(
    expansion: Expansion,
    writer: SafetensorsWriter,
    folder: Path,
    title: str,
    reasons: tuple[str, ...],
    plan: dict[str, Any],
) -> None:
    """Add all files except the weights. The marker comes last."""
    start = f"not the parent's function: {'; '.join(reasons)}" if reasons else "the parent's function, up to rounding"
    facts = spec_fact(expansion.spec) | {"Type": dtype_name(expansion.dtype), "Made to compute": start}
    dense, moe_arch = expansion.dense, expansion.moe_arch
    if parts := left_out(dense.others()):
        facts["Copied as they are" if expansion.whole else "Left out"] = left_out_text(parts)
    parents = [source.path for source in dense.branches()]
    whole = expansion.whole
    card = CardText(
        title=title,
        tool="nemo-upcycle convert",
        facts=facts,
        notes=_caveats(expansion),
        options=load_options(moe_arch, expansion.dtype.itemsize),
    )
    write_card(folder, parents, moe_arch, card, whole_class=whole.wrapper.hf_class if whole else "")
    write_config(dense.path, folder, moe_arch, expansion.dtype, wrapper=whole.wrapper if whole else None)
    tokenizer_files = copy_tokenizer_files(dense.path, folder, sees=whole is not None)
    marker = {
        "tensors": writer.tensors,
        "bytes": writer.total_bytes,
        "companions": tokenizer_files,
        "made_from": plan,
    }
    write_json(folder / MODEL_MARKER, marker)


def _caveats(expansion: Expansion) -> tuple[str, ...]:
    wrapper = expansion.whole.wrapper.hf_class if expansion.whole else ""
    return caveats(Written(expansion.moe_arch, expansion.dtype.itemsize, wrapper))


def _plan_of(dense: DenseSource, spec: UpcycleSpec, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, Any]:
    """Return everything that determines the output. Files of a stopped run are kept only if the run had the same plan.

    Files of two models with the same shapes have the same headers. So the plan includes the times at which the
    source's files were written.
    """
    sources = []
    for source in dense.branches():
        folders = (source.path, source.path / "weights")  # NeMo's files are in `weights`
        files = [path for name in source.fingerprint() for folder in folders if (path := folder / name).is_file()]
        changed_ns = {str(path.relative_to(source.path)): path.stat().st_mtime_ns for path in files}
        sources.append({"path": str(source.path.resolve()), "files": source.fingerprint(), "changed_ns": changed_ns})
    return {
        "sources": sources,
        "mixed": list(dense.inexact_because()),
        "config_sha256": sha256_file(dense.path / "config.json"),
        "spec": without_defaults(asdict(spec)),
        "utility_sha256": sha256_file(Path(spec.expert_utility).expanduser()) if spec.expert_utility else None,
        "calibration_sha256": calibration.sha256 if (calibration := calibration_of(spec)) else None,
        "dtype": str(dtype),
        "max_shard_bytes": max_shard_bytes,
        "version": __version__,
    }


def _is_done(output: Path, plan: dict[str, Any]) -> bool:
    """Return whether an earlier run finished exactly this conversion. Nothing else may be at `output`.

    Raises:
        UpcycleError: something else is at `output`, which this package never deletes.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if is_complete(output) and read_json(output / MODEL_MARKER).get("made_from") == plan:
        return True
    raise UpcycleError(
        str(output),
        kind="state",
        got="is a finished folder made from other inputs"
        if is_complete(output)
        else "holds files that this command did not write",
        fix="choose another name, or remove it first",
    )


def _check_done(output: Path, writer: SafetensorsWriter) -> None:
    """Check that all files of a finished conversion are still there.

    Raises:
        UpcycleError: a file is missing or has another size or header.
    """
    others = [
        "config.json",
        *([INDEX] if len(writer.files) > 1 else []),
        *read_json(output / MODEL_MARKER)["companions"],
    ]
    lost = [name for name in others if not (output / name).is_file()]
    lost += [file for file in writer.files if not writer.is_whole(output, file)]
    if lost:
        raise UpcycleError(
            str(output),
            kind="state",
            got=f"has missing or damaged files: {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
            fix="remove the folder and run the same command again",
        )


def _add_tokenizer_files(dense_folder: Path, output: Path, *, sees: bool) -> None:
    """Copy files, such as a tokenizer, that were added to the parent's folder after the conversion."""
    marker = read_json(output / MODEL_MARKER)
    if not set(tokenizer_file_names(dense_folder, sees=sees)) <= set(marker["companions"]):
        names = copy_tokenizer_files(dense_folder, output, sees=sees)
        write_json(output / MODEL_MARKER, marker | {"companions": names})
