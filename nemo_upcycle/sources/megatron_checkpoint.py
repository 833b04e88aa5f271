"""A dense NeMo 2 or Megatron distributed checkpoint, read by slice under Hugging Face's names.

Megatron fuses tensors that Hugging Face keeps apart. Query, key and value are interleaved by key-value group, and the
gate projection lies above the up projection. The mapping table says which rows of a Megatron tensor form a Hugging
Face tensor, and only these rows are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.mapping import find_stored, mapping_of, split_stored, stored_hybrid
from nemo_upcycle.models.mapping_table import BY_ROLE, MOE_MAPPINGS, ParamMapping, Sharding
from nemo_upcycle.models.megatron_config import require_buildable
from nemo_upcycle.models.sharding import Shard, SourceSlice, shard_shape, source_slices, tensor_shape
from nemo_upcycle.sources.base import DenseSource, Index
from nemo_upcycle.sources.checkpoint_context import CheckpointContext, read_context
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint, model_prefix
from nemo_upcycle.sources.mapped_files import TensorFiles, bounds_of


#: Prefix of optimizer states. If there are several optimizers, as in MoE training, the states are numbered.
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class _Fused:
    """The Megatron tensor that holds a Hugging Face tensor.

    Args:
        key: name of the Megatron tensor in the checkpoint.
        mapping: row of the mapping table for the Megatron parameter.
        slices: rows of the Megatron tensor that form the Hugging Face tensor, in the row order of Hugging Face.
        shape: shape of the Megatron tensor without the layer axis.
        layer: index on the layer axis; None without this axis.
    """

    key: str
    mapping: ParamMapping
    slices: tuple[SourceSlice, ...]
    shape: tuple[int, ...]
    layer: int | None


def model_tensors(checkpoint: DistributedCheckpoint, prefix: str) -> Iterator[str]:
    """Yield the names of the model's own tensors, without optimizer states and layers' extra states (FP8 factors).

    Args:
        checkpoint: open checkpoint.
        prefix: prefix that `model_prefix` returns.
    """
    for name in checkpoint.names():
        if name.startswith(prefix) and not _OPTIMIZER.match(name) and "_extra_state" not in name:
            yield name


def is_megatron(path: Path) -> bool:
    """Return whether a folder is a NeMo or Megatron distributed checkpoint, even an unfinished one."""
    folders = (path, path / "weights")
    return any((folder / ".metadata").is_file() or any(folder.glob("*.distcp")) for folder in folders)


def read_megatron_architecture(path: Path) -> Architecture:
    """Return the architecture of a NeMo or Megatron checkpoint, dense or with experts, for the planner.

    Args:
        path: checkpoint folder, without a Hugging Face `config.json`.

    Raises:
        CheckpointError: the checkpoint is unfinished or damaged, or describes no known model.
    """
    weights = path / "weights"
    with DistributedCheckpoint(weights if weights.is_dir() else path) as checkpoint:
        return _saved_context(path).model(_embedding_rows(checkpoint, model_prefix(checkpoint)))


def _saved_context(path: Path) -> CheckpointContext:
    if context := read_context(path):
        return context
    raise CheckpointError(
        str(path),
        kind="missing",
        got="does not describe its model: no context/model.yaml (NeMo's), run_config.yaml (Bridge's) or config.json",
        fix="put the model's Hugging Face config.json into the folder",
    )


def _embedding_rows(checkpoint: DistributedCheckpoint, prefix: str) -> int:
    return checkpoint.shape(prefix + BY_ROLE["embedding"].stored[0])[0]


class MegatronCheckpoint(TensorFiles[_Fused], DenseSource):
    """A dense checkpoint of NeMo 2 (with `weights/` and `context/`) or of Megatron (with `.metadata`).

    If a slice consists of consecutive rows inside one saved piece, `read` returns a view of the mapped file. Otherwise
    `read` assembles the slice in new memory of the slice's size. `bytes_read` counts only the slices. In addition,
    some hundred bytes of each piece that a slice touches are read once. Optimizer states and other layers are not
    read.

    Args:
        path: checkpoint folder. A Hugging Face `config.json` in it takes precedence over the settings in `context/`.

    Raises:
        CheckpointError: the checkpoint is unfinished or damaged, is not a dense model of a known kind, has an unknown
            configuration, or has a configuration that disagrees with the weights.

    Example:
        >>> with MegatronCheckpoint(Path("checkpoints/llama3-8b")) as dense:  # doctest: +SKIP
        ...     query_2KD = dense.read("model.layers.0.self_attn.q_proj.weight", [(0, 256), (0, 4096)])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        weights = path / "weights"
        self._checkpoint = DistributedCheckpoint(weights if weights.is_dir() else path)
        self.files = self._checkpoint.files
        self._prefix = model_prefix(self._checkpoint)
        self.architecture = self._read_architecture()
        require_buildable(self.architecture)
        if self.architecture.delta:
            raise CheckpointError(
                str(path),
                kind="refused",
                got="has gated delta nets, which cannot be read from Megatron checkpoints",
                fix="give the model's Hugging Face folder",
            )
        self._tensors = dict(self._find_all())

    def _read_architecture(self) -> Architecture:
        if (self.path / "config.json").is_file():
            return read_architecture(self.path)
        return _saved_context(self.path).dense_model(_embedding_rows(self._checkpoint, self._prefix))

    def _find_all(self) -> Iterator[tuple[str, _Fused]]:
        """Yield every Hugging Face tensor by name. Refuse a checkpoint with tensors that the table does not have."""
        keys = list(model_tensors(self._checkpoint, self._prefix))
        hybrid = stored_hybrid([key.removeprefix(self._prefix) for key in keys])
        for key in keys:
            layer, name = split_stored(key.removeprefix(self._prefix))
            mapping = find_stored(name, in_layer=layer is not None)
            if hybrid and layer:
                layer = str(hybrid.parts[int(layer)].layer)
            is_moe, tied = mapping in MOE_MAPPINGS, self.architecture.tied_embeddings
            if mapping is None or is_moe or (mapping.role == "output" and tied):
                raise CheckpointError(
                    str(self.path),
                    kind="state",
                    got=f"has the tensor {key}, which a dense {self.architecture.hf_class} does not have",
                    fix="give the dense parent" if is_moe else "check that configuration and weights belong together",
                )
            yield from self._find(key, mapping_of(mapping.role, self.architecture), layer)

    def _find(self, key: str, mapping: ParamMapping, layer: str | None) -> Iterator[tuple[str, _Fused]]:
        shape, stacked = self._checkpoint.shape(key), layer == ""
        own = shape[1:] if stacked else shape
        self._check(key, mapping, own)
        tensors: dict[str, tuple[SourceSlice, ...]] = {}
        for slice_ in source_slices(mapping, self.architecture, Shard(), own):
            name = mapping.hf[slice_.part]
            tensors[name] = (*tensors.get(name, ()), slice_)
        for number in range(shape[0]) if stacked else [int(layer or 0)]:
            for name, slices in tensors.items():
                yield name.format(layer=number), _Fused(key, mapping, slices, own, number if stacked else None)

    def _check(self, key: str, mapping: ParamMapping, shape: tuple[int, ...]) -> None:
        arch = self.architecture
        is_vocabulary = mapping.sharding is Sharding.VOCABULARY
        wanted = shard_shape(
            mapping, arch, Shard(), padded_vocab=max(shape[0], arch.vocab_size) if is_vocabulary else None
        )
        dtype = self._checkpoint.dtype(key)
        fix = "check that configuration and weights belong together"
        if shape != wanted:
            raise CheckpointError(
                f"{self.path}: shape of {key}",
                got=list(shape),
                expected=f"{list(wanted)}, as in the configuration",
                fix=fix,
            )
        if dtype not in _FLOATS:
            raise CheckpointError(f"{self.path}: type of {key}", got=dtype, expected="a floating-point type", fix=fix)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, without padding."""
        fused = self._entry(name)
        return tensor_shape(fused.mapping, fused.slices[0].part, self.architecture)

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""
        return self._checkpoint.dtype(self._entry(name).key)

    def read(self, name: str, index: Index | None = None) -> torch.Tensor:
        """Return a slice. Copy it; never write to it.

        Args:
            name: the tensor.
            index: (start, stop) along every axis; the whole tensor if None.

        Raises:
            CheckpointError: there is no such tensor, the slice reaches beyond it, or its data are damaged.
        """
        bounds, key = bounds_of(self.path, name, self.shape(name), index), self._entry(name).key
        runs = [self._checkpoint.read(key, run) for run in self._runs(name, bounds)]
        sizes = [stop - start for start, stop in bounds]
        if not runs:
            return torch.empty(sizes, dtype=self.dtype(name))
        return (runs[0] if len(runs) == 1 else torch.cat(runs, dim=-len(sizes))).view(sizes)

    def prefetch(self, name: str, index: Index | None = None) -> None:
        """Start to fetch a slice that will be read soon."""
        for run in self._runs(name, bounds_of(self.path, name, self.shape(name), index)):
            self._checkpoint.prefetch(self._entry(name).key, run)

    def _runs(self, name: str, bounds: list[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
        """Yield each range of Megatron rows that a slice needs. A query, key or value has one range per group."""
        fused, end = self._entry(name), 0
        layer = [] if fused.layer is None else [(fused.layer, fused.layer + 1)]
        for slice_ in fused.slices:
            rows, block = slice_.rows[1] - slice_.rows[0], fused.shape[0] // slice_.blocks
            begin, end = end, end + rows * slice_.blocks  # rows of `slice_` in the Hugging Face tensor
            start, stop = max(bounds[0][0], begin) - begin, min(bounds[0][1], end) - begin
            for number in range(start // rows, -(-stop // rows) if start < stop else 0):
                first, last = max(start, number * rows), min(stop, (number + 1) * rows)
                moved = number * (block - rows) + slice_.rows[0]
                yield [*layer, (first + moved, last + moved), *bounds[1:]]

    def fingerprint(self) -> dict[str, str]:
        """Return the size of every file, and the sha256 of the metadata."""
        return self._checkpoint.fingerprint()
