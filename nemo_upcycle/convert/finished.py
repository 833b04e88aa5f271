"""Whether a folder is the finished result of this very conversion: told by its marker, and by sizes and headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.convert.hf_folder import copy_tokenizer_files, tokenizer_file_names
from nemo_upcycle.convert.safetensors_writer import SafetensorsWriter
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.package_info import __version__
from nemo_upcycle.sources.base import DenseSource
from nemo_upcycle.sources.safetensors_folder import INDEX
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import MODEL_MARKER, is_complete, read_json, sha256_file, write_json


def plan_of(dense: DenseSource, spec: UpcycleSpec, dtype: torch.dtype, max_shard_bytes: int) -> dict[str, Any]:
    """Return what the bytes of the output follow from; files of a stopped run are kept only if all of it is the same.

    Two models of one shape have the same headers: the times at which the files were written tell them apart.
    """
    sources = []
    for source in dense.branches():
        folders = (source.path, source.path / "weights")  # NeMo's files are in the latter
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


def is_done(output: Path, plan: dict[str, Any]) -> bool:
    """Return whether an earlier run finished this very conversion; nothing else may stand where the output goes.

    Raises:
        UpcycleError: something else does. It is never deleted.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if is_complete(output) and _marker(output).get("made_from") == plan:
        return True
    raise UpcycleError(
        str(output),
        got="a finished folder made from something else" if is_complete(output) else "files that are not ours",
        expected="no such folder, or an empty one",
        fix="choose another name, or remove it first",
    )


def check_done(output: Path, writer: SafetensorsWriter) -> None:
    """Check that what an earlier run finished is still there.

    Raises:
        UpcycleError: a file is missing or has another size or header.
    """
    others = ["config.json", *([INDEX] if len(writer.files) > 1 else []), *_marker(output)["companions"]]
    lost = [name for name in others if not (output / name).is_file()]
    lost += [file for file in writer.files if not writer.is_whole(output, file)]
    if lost:
        raise UpcycleError(
            str(output),
            got=f"no whole {lost[0]}" + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
            expected="every file of the finished conversion",
            fix="remove the folder and run the same command again",
        )


def _marker(output: Path) -> dict[str, Any]:
    """Return what a finished folder says of itself.

    Raises:
        UpcycleError: it is damaged.
    """
    try:
        marker = read_json(output / MODEL_MARKER)
        tokenizer_files = marker.get("companions", []) if isinstance(marker, dict) else None
        if isinstance(tokenizer_files, list) and all(isinstance(name, str) for name in tokenizer_files):
            return {**marker, "companions": tokenizer_files}
    except UpcycleError:
        pass
    raise UpcycleError(
        str(output / MODEL_MARKER),
        got="a damaged file",
        expected="the marker of a finished folder",
        fix="choose another name, or remove the folder and run the same command again",
    )


def add_tokenizer_files(dense_folder: Path, output: Path) -> None:
    """Copy files, say a tokenizer, that the parent's folder got after the conversion."""
    marker = _marker(output)
    if not set(tokenizer_file_names(dense_folder)) <= set(marker["companions"]):
        write_json(output / MODEL_MARKER, marker | {"companions": copy_tokenizer_files(dense_folder, output)})
