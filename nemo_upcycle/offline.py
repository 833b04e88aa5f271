"""A dense checkpoint -> an upcycled Hugging Face folder, without a training job: the bits of upcycling and exporting.

Every file of the output stands under its own name only when it is whole and on the disk, so a run that was stopped, at
any time and by anything, goes on with the first file that is missing. `expansion.py` makes the files.
"""

from __future__ import annotations

import errno
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError, UpcycleError, problem
from nemo_upcycle.expansion import Expansion
from nemo_upcycle.files import (
    MARKER,
    clear,
    clear_unfinished,
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
from nemo_upcycle.hf_folder import (
    MAX_SHARD_BYTES,
    companions_of,
    copy_companions,
    require_dtype,
    shard_files,
    write_config,
    write_index,
)
from nemo_upcycle.package_info import __version__
from nemo_upcycle.progress import ProgressLine
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.branches import require_copies
from nemo_upcycle.sources.checks import BrokenWeights, check_shapes, check_source, rounded_because
from nemo_upcycle.sources.safetensors_folder import INDEX
from nemo_upcycle.spec import UpcycleSpec


_PLAN, _UNFINISHED = ".conversion.json", ".unfinished"
#: What a file system may refuse in the middle of the work.
_FULL = {
    errno.ENOSPC: ("full", "room"),
    errno.EDQUOT: ("quota used up", "room"),
    errno.EFBIG: ("a file too large for it", "files of up to 5 GB (see ulimit -f, too)"),
}


@dataclass(frozen=True)
class Conversion:
    """What `convert` did; bytes and seconds are of this call, which may have found some files done already."""

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
    seconds: float
    peak_rss_gib: float


def convert(
    dense: DenseSource,
    output: Path,
    spec: UpcycleSpec,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: bool = True,
) -> Conversion:
    """Write the Hugging Face folder of the model that a spec makes of a dense checkpoint; complete or not at all.

    The bits are those of `upcycle_into` in a model of that type, exported. Work in progress lies in a hidden folder
    beside `output`; called again with the same source and spec, what is finished there is kept.

    Args:
        dense: the open dense checkpoint, whose folder also has config and tokenizer.
        output: the folder to make.
        spec: what to make.
        dtype: type of the weights on disk, in which they are scaled and changed, too; the source's own when None.
        max_shard_bytes: largest size of a file.
        progress: whether to show how far it is, on stderr.

    Returns:
        Counts, bytes, time and whether the model computes the dense function.

    Raises:
        SpecError: the spec does not fit, or no Hugging Face class can hold the model. Nothing was written.
        CheckpointError: the source is damaged, holds NaN or infinity, or does not fit its `config.json`.
        UpcycleError: `output` is there already and something else or damaged, another process writes it, no file can
            hold weights of this type, or the disk is full.

    Example:
        >>> with open_dense("models/Llama-3-8B") as dense:  # doctest: +SKIP
        ...     convert(dense, Path("models/Llama-3-8B-E8T2"), UpcycleSpec(num_experts=8, top_k=2))
    """
    start_s, bytes_before = time.monotonic(), dense.bytes_read
    output = resolved(output)
    require_apart(output, *(source.path for source in dense.branches()))
    require_dtype(dtype := dtype or dense.dtype("model.embed_tokens.weight"))
    require_copies(dense, spec.copies)
    expansion = Expansion(dense, spec, dtype)
    made, names = expansion.made, list(expansion.shapes)
    _check_folder(dense)
    check_source(dense)
    check_shapes(dense)
    files = shard_files(expansion.shapes, dtype, max_shard_bytes)
    plan = _plan(dense, spec, dtype, max_shard_bytes)
    kept, written = set(files), 0
    if _is_done(output, plan):
        _check_done(output, expansion, files)
        _add_companions(dense.path, output)
        forget_work(output, _PLAN)
    else:
        with _only_writer(output, plan) as folder:
            kept = {file for file in files if _is_whole(folder / file, expansion, files[file])}
            written = _write(expansion, folder, files, kept, f"convert {output.name}", progress)
            _finish(expansion, folder, files, plan)
    reasons = (*spec.inexact_because, *dense.inexact_because(), *rounded_because(dense, dtype, spec))
    total_params = expansion.size_bytes(names) // dtype.itemsize
    return Conversion(
        output=output,
        hf_class=made.hf_class,
        dtype=str(dtype).removeprefix("torch."),
        exact=not reasons,
        inexact_because=reasons,
        dense_params=dense.architecture.total_params,
        total_params=total_params,
        active_params=total_params - made.total_params + made.active_params,
        tensors=len(names),
        files=len(files),
        files_kept=len(kept),
        bytes_total=expansion.size_bytes(names),
        bytes_written=written,
        bytes_read=dense.bytes_read - bytes_before,
        seconds=round(time.monotonic() - start_s, 3),
        peak_rss_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    )


def _check_folder(dense: DenseSource) -> None:
    """Check what is not needed before the end: config and tokenizer stand beside Hugging Face's weights only."""
    if not (dense.path / "config.json").is_file():
        expected, fix = "a Hugging Face folder", "export the checkpoint first (nemo-upcycle export), then convert that"
        raise CheckpointError(problem(str(dense.path), got="no config.json", expected=expected, fix=fix))


def _plan(dense: DenseSource, spec: UpcycleSpec, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, Any]:
    """Return what the bytes of the output follow from; files of a stopped run are kept only if all of it is the same.

    Two models of one shape have the same headers: the times at which the files were written tell them apart.
    """
    sources = []
    for source in dense.branches():
        folders = (source.path, source.path / "weights")  # NeMo's files lie in the latter
        files = [path for name in source.fingerprint() for folder in folders if (path := folder / name).is_file()]
        changed_ns = {str(path.relative_to(source.path)): path.stat().st_mtime_ns for path in files}
        sources.append({"path": str(source.path.resolve()), "files": source.fingerprint(), "changed_ns": changed_ns})
    return {
        "sources": sources,
        "mixed": list(dense.inexact_because()),
        "config_sha256": sha256_file(dense.path / "config.json"),
        "spec": spec.to_dict(),
        "dtype": str(dtype),
        "max_shard_bytes": max_shard_bytes,
        "version": __version__,
    }


def _is_done(output: Path, plan: dict[str, Any]) -> bool:
    """Return whether an earlier run finished this very conversion; nothing else may stand where the output goes.

    Raises:
        UpcycleError: something else does. It is never deleted.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    marker = read_json(output / MARKER) if is_complete(output) else None
    if isinstance(marker, dict) and marker.get("made_from") == plan:
        return True
    got = "a finished folder made from something else" if is_complete(output) else "files that are not ours"
    fix = "choose another name, or remove it first"
    raise UpcycleError(problem(str(output), got=got, expected="no such folder, or an empty one", fix=fix))


def _check_done(output: Path, expansion: Expansion, files: dict[str, list[str]]) -> None:
    """Check that what an earlier run finished is still there.

    Raises:
        UpcycleError: a file is missing or has another size or header.
    """
    others = ["config.json", *([INDEX] if len(files) > 1 else []), *read_json(output / MARKER)["companions"]]
    lost = [name for name in others if not (output / name).is_file()]
    lost += [file for file, names in files.items() if not _is_whole(output / file, expansion, names)]
    if lost:
        got = f"no whole {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
        expected, fix = "every file of the finished conversion", "remove the folder and run the same command again"
        raise UpcycleError(problem(str(output), got=got, expected=expected, fix=fix))


def _add_companions(dense_folder: Path, output: Path) -> None:
    """Copy what the parent's folder got after the conversion, say a tokenizer."""
    marker = read_json(output / MARKER)
    if not {path.name for path in companions_of(dense_folder)} <= set(marker["companions"]):
        write_json(output / MARKER, marker | {"companions": copy_companions(dense_folder, output)})


@contextmanager
def _only_writer(output: Path, plan: dict[str, Any]) -> Iterator[Path]:
    """Give the folder to work in, to one process at a time, with what a stopped run of the same plan left there."""
    with only_writer(output) as aside:
        try:
            if not (aside / _PLAN).is_file() or read_json(aside / _PLAN) != plan:
                clear(aside)
                write_json(aside / _PLAN, plan)
            clear_unfinished(aside, f"*{_UNFINISHED}")  # before anyone asks how much room there is
            yield aside
        except BaseException as error:
            clear_unfinished(aside, f"*{_UNFINISHED}")
            # What is made of a broken source is not worth keeping; a file system that failed may work again.
            if isinstance(error, BrokenWeights) or not any(aside.glob("*.safetensors")):
                shutil.rmtree(aside)
            if not isinstance(error, OSError) or error.errno not in _FULL:
                raise
            got, expected = _FULL[error.errno]
            fix = "mend that and run the same command again: finished files are kept"
            raise UpcycleError(problem(f"disk of {output}", got=got, expected=expected, fix=fix)) from None
    forget_work(output, _PLAN)  # not before it is in its place: without a plan nothing is kept


def _is_whole(path: Path, expansion: Expansion, names: list[str]) -> bool:
    header = expansion.header(names)
    if not path.is_file() or path.stat().st_size != len(header) + expansion.size_bytes(names):
        return False
    with path.open("rb") as handle:
        return handle.read(len(header)) == header


def _write(
    expansion: Expansion, folder: Path, files: dict[str, list[str]], kept: set[str], label: str, progress: bool
) -> int:
    """Write the files that are missing; return their bytes."""
    todo = {file: names for file, names in files.items() if file not in kept}
    needed_bytes = sum(expansion.size_bytes(names) for names in todo.values())
    require_disk(folder, needed_bytes, f"the rest of {label}" if kept else label)
    with ProgressLine(label, len(expansion.shapes), enabled=progress) as line:
        line.advance(sum(len(files[file]) for file in kept))
        _write_files(expansion, folder, todo, line)
    return needed_bytes


class _Stopped(Exception):
    """Another file could not be written."""


def _write_files(expansion: Expansion, folder: Path, todo: dict[str, list[str]], line: ProgressLine) -> None:
    """Write several files at a time; the first that fails stops all."""
    stopped, counting = threading.Event(), threading.Lock()

    def advance(tensors: int) -> None:
        if stopped.is_set():
            raise _Stopped
        with counting:
            line.advance(tensors)

    def write(file: str) -> None:
        unfinished = folder / f"{file}{_UNFINISHED}"
        expansion.write_file(unfinished, todo[file], advance)
        unfinished.rename(folder / file)

    with ThreadPoolExecutor(expansion.writers, "write") as pool:
        try:
            for job in as_completed([pool.submit(write, file) for file in todo]):
                job.result()
        except BaseException:  # an interrupt, too
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _finish(expansion: Expansion, folder: Path, files: dict[str, list[str]], plan: dict[str, Any]) -> None:
    """Add everything but the weights; the marker comes last."""
    total_bytes = expansion.size_bytes(list(expansion.shapes))
    write_index(folder, files, total_bytes)
    write_config(expansion.dense.path, folder, expansion.made, expansion.dtype)
    companions = copy_companions(expansion.dense.path, folder)
    marker = {"tensors": len(expansion.shapes), "bytes": total_bytes, "companions": companions, "made_from": plan}
    write_json(folder / MARKER, marker)
