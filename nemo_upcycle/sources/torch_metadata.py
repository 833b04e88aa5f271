"""`.metadata` of a torch_dist checkpoint: which piece of which tensor lies where.

It is a pickle of torch's own classes. It is opened with a list of the only ones that it may name, and gets stand-ins
for them: nothing that it builds, calls or changes is torch's, Python's or this package's.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.inert_pickle import Inert
from nemo_upcycle.sources.torch_piece import DTYPE_NAMES


class _Metadata(Inert):
    """Stand-in for torch's class and for Megatron's subclass of it."""

    state_dict_metadata: dict[str, Any]
    storage_data: dict[Any, Any]


class _Properties(Inert):
    """Stand-in for a tensor's properties, whose values torch saves in order."""

    dtype: Any

    def __setstate__(self, state: Any) -> None:
        self.dtype = state[0]


#: What torch's and Megatron's own writers put into `.metadata`, and what stands in for it.
_STANDS_IN: dict[str, dict[str, Any]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata": Inert,
        "ChunkStorageMetadata": Inert,
        "Metadata": _Metadata,
        "MetadataIndex": Inert,
        "StorageMeta": Inert,
        "TensorProperties": _Properties,
        "TensorStorageMetadata": Inert,
        "_MEM_FORMAT_ENCODING": Inert,
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": Inert},
    "torch.serialization": {"_get_layout": Inert},
    # Python and torch do not let anyone change these: neither builtins nor values.
    "torch": {"Size": tuple, "device": Inert, "dtype": Inert} | {name: getattr(torch, name) for name in DTYPE_NAMES},
    "builtins": {"set": set, "frozenset": frozenset, "slice": slice},
    "collections": {"OrderedDict": dict},
    "pathlib": {"Path": Inert, "PosixPath": Inert, "PurePosixPath": Inert},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "megatron.core.dist_checkpointing.strategies.torch":
            return _Metadata if name == "MCoreMetadata" else Inert
        if module == "torch.distributed.checkpoint.planner":
            return Inert  # a save plan
        if name not in _STANDS_IN.get(module, ()):
            raise pickle.UnpicklingError(f"the class {module}.{name} is not allowed in checkpoint metadata")
        return _STANDS_IN[module][name]


@dataclass(frozen=True)
class FileSpan:
    """The bytes of a file that hold a piece of a tensor; `transforms` says how they are compressed, None for not."""

    file: str
    offset: int
    length: int
    transforms: Any


def read_metadata(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, tuple[int, ...]], FileSpan], str]:
    """Return the tensors, the spans of their pieces by name and offset, and the sha256 of the file."""
    path = folder / ".metadata"
    if not path.is_file():
        raise CheckpointError(
            str(folder),
            got="no .metadata",
            expected="a finished Megatron distributed checkpoint",
            fix="point to the checkpoint's weights folder; one without .metadata was not finished",
        )
    try:
        raw = path.read_bytes()
        metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
        if not isinstance(metadata, _Metadata):
            raise pickle.UnpicklingError(f"a {type(metadata).__name__}")
        return _tensors_of(metadata), _spans_of(metadata), hashlib.sha256(raw).hexdigest()
    except OSError:
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        reason = str(error) or type(error).__name__
        raise CheckpointError(
            str(path), got=f"unreadable metadata ({reason})", expected="torch_dist metadata", fix="copy it again"
        ) from None


def _tensors_of(metadata: _Metadata) -> dict[str, Any]:
    entries = metadata.state_dict_metadata
    tensors = {name: entry for name, entry in entries.items() if hasattr(entry, "chunks")}
    for name, entry in tensors.items():
        _require(isinstance(name, str) and isinstance(entry.properties.dtype, torch.dtype), name)
        for chunk in entry.chunks:
            _require(len(chunk.offsets) == len(chunk.sizes) == len(entry.size), name)
    return tensors


def _spans_of(metadata: _Metadata) -> dict[tuple[str, tuple[int, ...]], FileSpan]:
    spans = {}
    for index, info in metadata.storage_data.items():
        if (offset := getattr(index, "offset", None)) is not None:
            span = FileSpan(info.relative_path, info.offset, info.length, getattr(info, "transform_descriptors", None))
            _require(isinstance(span.file, str) and span.offset >= 0 and span.length >= 0, index.fqn)
            spans[index.fqn, tuple(offset)] = span
    return spans


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"{name} is not described as torch does it")
