"""A Megatron distributed checkpoint (torch_dist), read by slice, without Megatron and without building a model.

Such a folder holds `.metadata`, a pickle that says which piece of which tensor lies where, and `*.distcp` files that
the ranks wrote. The pickle is opened with a list of the only classes that it may name; the pieces with `weights_only`.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from nemo_upcycle.errors import CheckpointError, problem, unknown
from nemo_upcycle.sources.base import Index


#: What torch's and Megatron's own writers put into `.metadata`; nothing here runs code when it is built.
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "device", "dtype"}
    | {str(dtype).removeprefix("torch.") for dtype in torch.storage._dtype_to_storage_type_map()},
    "builtins": {"set", "frozenset", "slice"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class _Ignored:
    """Stands in for what a writer noted for itself (save plans, Megatron's extra fields): built, never used."""

    def __init__(self, *_: object) -> None: ...


class _MegatronMetadata(Metadata):
    """Stands in for Megatron's subclass, so that Megatron need not be installed."""


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "megatron.core.dist_checkpointing.strategies.torch":
            return _MegatronMetadata if name == "MCoreMetadata" else _Ignored
        if module == "torch.distributed.checkpoint.planner":
            return _Ignored
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"the class {module}.{name} is not allowed in checkpoint metadata")
        return super().find_class(module, name)


def _read_metadata(folder: Path) -> Any:
    path = folder / ".metadata"
    if not path.is_file():
        raise CheckpointError(
            problem(
                str(folder),
                got="no .metadata",
                expected="a finished Megatron distributed checkpoint",
                fix="point to the checkpoint's weights folder; one without .metadata was not finished",
            )
        )
    try:
        metadata = _MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"a {type(metadata).__name__}")
        return metadata
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(
            problem(
                str(path), got=f"unreadable metadata ({error})", expected="torch_dist metadata", fix="copy it again"
            )
        ) from None


class DistributedCheckpoint:
    """Named tensors of a torch_dist checkpoint, of which any slice can be read.

    Args:
        folder: the folder with `.metadata` (of a NeMo checkpoint: its `weights`).

    Raises:
        CheckpointError: it is missing, unfinished or names files that do not exist.

    Example:
        >>> checkpoint = DistributedCheckpoint(Path("last/weights"))  # doctest: +SKIP
        >>> router_1ED = checkpoint.read("decoder.layers.mlp.router.weight", [(0, 1), (0, 8), (0, 576)])
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        metadata = _read_metadata(folder)
        self._tensors = {key: value for key, value in metadata.state_dict_metadata.items() if hasattr(value, "chunks")}
        self._places = {
            (index.fqn, tuple(index.offset)): info
            for index, info in metadata.storage_data.items()
            if index.offset is not None
        }
        self._last: tuple[Any, torch.Tensor] | None = None
        files = {info.relative_path for info in self._places.values()}
        if missing := sorted(file for file in files if not (folder / file).is_file()):
            raise CheckpointError(
                problem(
                    str(folder), got=f"no {missing[0]}", expected="every file of the checkpoint", fix="copy it again"
                )
            )

    def names(self) -> Iterable[str]:
        """Return the names of its tensors."""
        return self._tensors.keys()

    def _entry(self, name: str) -> Any:
        if name not in self._tensors:
            raise CheckpointError(f"{self.path}: {unknown('tensor', name, self._tensors)}")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, over all ranks that wrote it."""
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        return self._entry(name).properties.dtype

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Return a slice, given as (start, stop) along every axis, put together from the pieces that overlap it.

        Raises:
            CheckpointError: there is no such tensor, a piece is damaged or the pieces do not cover the slice.
        """
        entry = self._entry(name)
        wanted = list(index) if index is not None else [(0, size) for size in entry.size]
        result = torch.empty([stop - start for start, stop in wanted], dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            overlap = [
                (max(start, offset), min(stop, offset + size))
                for (start, stop), offset, size in zip(wanted, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(start >= stop for start, stop in overlap):
                continue
            here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, wanted, strict=True))
            there = tuple(slice(a - offset, b - offset) for (a, b), offset in zip(overlap, chunk.offsets, strict=True))
            target = result[here]
            target.copy_(self._chunk(name, tuple(chunk.offsets), tuple(chunk.sizes))[there])
            filled += target.numel()
        if filled != result.numel():
            raise CheckpointError(
                problem(
                    f"{self.path}: {name}", got=f"{filled} elements", expected=f"{result.numel()}", fix="save it again"
                )
            )
        return result

    def _chunk(self, name: str, offset: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        info = self._places[name, offset]
        place = (info.relative_path, info.offset)
        if self._last is None or self._last[0] != place:
            with (self.path / info.relative_path).open("rb") as handle:
                handle.seek(info.offset)
                data = handle.read(info.length)
            try:
                tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
                raise CheckpointError(
                    problem(
                        str(self.path / info.relative_path),
                        got=f"damaged data of {name} ({type(error).__name__})",
                        expected="the bytes that the metadata names",
                        fix="copy the checkpoint again",
                    )
                ) from None
            # Neighbouring slices often lie in one piece.
            self._last = (place, tensor.view(sizes))
        return self._last[1]
