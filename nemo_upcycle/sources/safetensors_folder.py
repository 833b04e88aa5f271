"""A Hugging Face folder of safetensors files, read by slice through a memory map.

`read` returns a view of the mapped file after its bytes have been fetched into the page cache (`mapped_files.py`). So
a slice is not copied and needs no additional memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.mapping import hf_names, mapping_of_hf
from nemo_upcycle.models.sharding import tensor_shape
from nemo_upcycle.models.stacked import lies_transposed, stacks
from nemo_upcycle.models.wrapper import INDEX, SINGLE, wrapper_of
from nemo_upcycle.sources.base import DenseSource, Index, OtherTensor
from nemo_upcycle.sources.mapped_files import MappedFiles, Stored, TensorFiles, row_major
from nemo_upcycle.utils.files import read_json
from nemo_upcycle.utils.streams import ByteRange


#: Types that weights may have, by their names in the file format.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _broken(path: Path, got: str) -> CheckpointError:
    return CheckpointError(str(path), kind="state", got=got, fix="download or copy the file again")


def _read_header(path: Path) -> tuple[dict[str, Any], int, str]:
    """Read a file's header: the entry of every tensor, the start of the data, and the header's sha256.

    safetensors itself checks the file.
    """
    try:
        with safe_open(path, "numpy"):  # checks the file, but reads no tensor
            pass
    except (SafetensorError, OSError) as error:
        raise _broken(path, f"is truncated or damaged ({error})") from None
    with path.open("rb") as handle:
        raw = handle.read(int.from_bytes(handle.read(8), "little"))
    entries = {name: entry for name, entry in json.loads(raw).items() if name != "__metadata__"}
    return entries, 8 + len(raw), hashlib.sha256(raw).hexdigest()


def _stored(path: Path, name: str, entry: dict[str, Any], data_byte: int) -> Stored:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(
            str(path),
            kind="refused",
            got=f"has {name} in {entry['dtype']}, and weights are read only in {', '.join(_DTYPES)}",
            fix="use the unquantized checkpoint",
        )
    shape = tuple(entry["shape"])
    start_byte = data_byte + entry["data_offsets"][0]
    return Stored(path.name, _DTYPES[entry["dtype"]], shape, row_major(shape), start_byte)


def _files_of(folder: Path) -> dict[str, set[str]]:
    """Return the folder's files, each with the tensors that the index expects in it."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise _broken(folder / INDEX, "has no weight_map")
        files: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(str(file), set()).add(name)
        # transformers would use the single file here, but nothing shows whether this file or the index is outdated.
        if (folder / SINGLE).is_file() and set(files) != {SINGLE}:
            raise CheckpointError(
                f"Folder {folder}",
                kind="state",
                got=f"has both {INDEX} (naming {min(files)}) and {SINGLE}",
                fix=f"remove the outdated weights: either {INDEX} with its shards, or {SINGLE}",
            )
        return dict(sorted(files.items()))
    if (folder / SINGLE).is_file():
        return {SINGLE: set()}
    pickled = sorted(path.name for path in folder.glob("*") if path.name.endswith((".bin", ".bin.index.json", ".pth")))
    other = pickled or sorted(path.name for path in folder.glob("*.gguf"))
    way = (
        "pickled weights are not read, because they can run code. If you trust them, run AutoModelForCausalLM"
        f".from_pretrained({str(folder)!r}).save_pretrained(FOLDER, safe_serialization=True)"
    )
    raise CheckpointError(
        f"Folder {folder}",
        kind="missing",
        got=f"has no {SINGLE} and no {INDEX}" + (f", but {', '.join(other[:3])}" if other else ""),
        fix=way if pickled else "convert it to safetensors with transformers" if other else "check the path",
    )


class SafetensorsFolder(TensorFiles[Stored], DenseSource):
    """A dense checkpoint in Hugging Face's layout: `config.json` and one or many safetensors files.

    If the model has other parts, only the text model's tensors are listed, named as in a text-only folder.

    Opening the folder reads only the headers and checks them as the format requires. The tensors must fill the file
    from end to end without gaps or overlaps, and every tensor must be in the file that the index names.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors, or the architecture is unknown.

    Example:
        >>> with SafetensorsFolder(Path("runs/demo/dense")) as dense:  # doctest: +SKIP
        ...     gate_FD = dense.read("model.layers.0.mlp.gate_proj.weight")
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.architecture = read_architecture(folder)
        self._wrapper = wrapper_of(read_json(folder / "config.json"))
        self._others: list[OtherTensor] = []
        self._tensors = {}
        self._headers: dict[str, str] = {}
        self.files = MappedFiles(folder)
        for file, names in _files_of(folder).items():
            self._add_file(file, names)
        for name, experts in stacks(hf_names(self.architecture)).items():
            if name in self._tensors:
                self._add_experts(name, experts, self._tensors.pop(name))

    def _add_experts(self, name: str, experts: list[str], whole: Stored) -> None:
        count, *rest = whole.shape
        shape = tuple(rest)
        part = replace(whole, shape=shape, stride=row_major(shape))
        mapping, first, *_ = mapping_of_hf(experts[0], self.architecture)
        if lies_transposed(experts[0], shape, tensor_shape(mapping, first, self.architecture)):
            part = replace(part, shape=shape[::-1], stride=part.stride[::-1])
        part_bytes = math.prod(shape) * whole.dtype.itemsize
        names = experts if count == len(experts) else [f"{name}[{expert}]" for expert in range(count)]
        for expert, called in enumerate(names):
            self._tensors[called] = replace(part, start_byte=whole.start_byte + expert * part_bytes)

    def _add_file(self, file: str, names: set[str]) -> None:
        path = self.path / file
        if path.parent != self.path or not path.is_file():
            raise CheckpointError(
                str(self.path / INDEX),
                kind="missing",
                got=f"names the shard {file}, which is not in the folder",
                fix="download the missing shard",
            )
        entries, data_byte, self._headers[file] = _read_header(path)
        if absent := sorted(names - entries.keys()):
            raise _broken(path, f"has no {absent[0]}, which {INDEX} places there")
        for name, entry in entries.items():
            if self._wrapper and (part := self._wrapper.part_of(name)):
                start, stop = (data_byte + offset for offset in entry["data_offsets"])
                other = OtherTensor(name, part, entry["dtype"], tuple(entry["shape"]), path, start, stop - start)
                self._others.append(other)
                continue
            called = self._wrapper.text_name(name) if self._wrapper else name
            if called in self._tensors:
                raise _broken(path, f"has {name}, and so does {self._tensors[called].file}")
            self._tensors[called] = _stored(path, name, entry, data_byte)

    def others(self) -> Sequence[OtherTensor]:
        """Return the tensors outside the text model."""
        return self._others

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        return self._entry(name).dtype

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Return a slice as a view of the mapped file. Copy the view; never write to it.

        For a slice of columns, whole rows are fetched, because the other ranks of the machine need the rest.

        Args:
            name: the tensor.
            index: (start, stop) along every axis; the whole tensor if None.

        Raises:
            CheckpointError: there is no such tensor, the slice reaches beyond it, or the file cannot be read.
        """
        return self.files.read(name, self._entry(name), index)

    def prefetch(self, name: str, index: Index | None = None) -> None:
        """Start to fetch a slice that will be read soon."""
        self.files.prefetch(name, self._entry(name), index)

    def byte_range(self, name: str, index: Index | None = None) -> ByteRange | None:
        """Return where the bytes of a slice are, if they are contiguous."""
        return self.files.part(name, self._entry(name), index)

    def fingerprint(self) -> dict[str, str]:
        """Return the size of every file in bytes and the sha256 of its header."""
        return {
            file: f"{(self.path / file).stat().st_size} bytes, header sha256 {digest}"
            for file, digest in self._headers.items()
        }
