"""Distributed checkpoints from torch's own writer: slices, and the effect of every kind of damage."""

from __future__ import annotations

import io
import os
import pickle
import pkgutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint


TENSORS = {
    "a": torch.arange(24.0).view(4, 6),
    "b": torch.arange(15.0).view(3, 5).to(torch.bfloat16),
    "transposed": torch.arange(24.0).view(4, 6).T,
    "scalar": torch.tensor(3.0),
}


#: Index of "a" in the metadata.
PLACE = MetadataIndex("a", torch.Size((0, 0)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(TENSORS, checkpoint_id=tmp_path / "weights", no_dist=True)
    return tmp_path / "weights"


def test_slices_and_only_they_are_counted(folder: Path) -> None:
    with DistributedCheckpoint(folder) as checkpoint:
        for name, tensor in TENSORS.items():
            assert checkpoint.dtype(name) == tensor.dtype
            assert torch.equal(checkpoint.read(name), tensor)
        before = checkpoint.bytes_read
        assert torch.equal(checkpoint.read("a", [(1, 3), (2, 6)]), TENSORS["a"][1:3, 2:6])
        assert checkpoint.bytes_read - before == 2 * 4 * 4
        assert sorted(checkpoint.fingerprint()) == [".metadata", "__0_0.distcp"]


def _edit(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the unpickled metadata, and write them back."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))


def _add_chunk(offset: int) -> Callable[[Any], None]:
    """Return a change that adds a second chunk to "a" at row `offset`, with the first chunk's bytes."""

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["a"]
        entry.size = torch.Size((8, 6))
        entry.chunks.append(ChunkStorageMetadata(torch.Size((offset, 0)), torch.Size((4, 6))))
        place = metadata.storage_data[PLACE]
        metadata.storage_data[MetadataIndex("a", torch.Size((offset, 0)))] = place

    return change


def test_pieces_that_overlap_or_leave_a_gap_are_refused(folder: Path) -> None:
    metadata = (folder / ".metadata").read_bytes()
    _edit(folder, _add_chunk(4))
    with DistributedCheckpoint(folder) as checkpoint:
        assert torch.equal(checkpoint.read("a"), torch.cat([TENSORS["a"]] * 2))
        assert torch.equal(checkpoint.read("a", [(3, 6), (1, 2)]), torch.cat([TENSORS["a"]] * 2)[3:6, 1:2])
    (folder / ".metadata").write_bytes(metadata)
    _edit(folder, _add_chunk(2))
    checkpoint = DistributedCheckpoint(folder)
    with pytest.raises(CheckpointError, match=r"weights: a has pieces that overlap"):
        checkpoint.read("a")
    with pytest.raises(CheckpointError, match=r"weights: a has 12 elements instead of 24"):
        checkpoint.read("a", [(4, 8), (0, 6)])


def _set_place(name: str, **changes: Any) -> Callable[[Any], None]:
    def change(metadata: Any) -> None:
        index = MetadataIndex(name, torch.Size((0, 0)))
        metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)

    return change


def _set(**changes: Any) -> Callable[[Any], None]:
    """Return a function that replaces the description of the tensor "a". `sizes` are the new sizes of a chunk."""

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["a"]
        for name, value in changes.items():
            setattr(entry.chunks[0] if name == "sizes" else entry, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda metadata: metadata.storage_data.pop(PLACE), r"\.metadata is damaged at a \(no place"),
        (_set(properties=TensorProperties(dtype=torch.bfloat16)), r"distcp is damaged at a \(ValueError"),
        (_set(size=torch.Size((5, 6)), sizes=torch.Size((5, 6))), r"distcp is damaged at a \(RuntimeError"),
        (_set_place("a", relative_path="../elsewhere"), r"weights has no \.\./elsewhere"),
        (_set_place("a", offset=-1), r"distcp is damaged at a \("),
        (_set_place("a", offset=10**9), r"distcp is damaged at a \(the file ends before it"),
        (_set_place("a", transform_descriptors=["zstd"]), r"distcp is damaged at a \(compressed"),
        (
            lambda metadata: setattr(metadata, "storage_data", None),
            r"\.metadata cannot be read as torch_dist metadata",
        ),
    ],
)
def test_metadata_that_does_not_fit_is_refused(folder: Path, change: Callable[[Any], None], words: str) -> None:
    _edit(folder, change)
    with pytest.raises(CheckpointError, match=words):
        DistributedCheckpoint(folder).read("a")


def test_a_file_cut_short_or_missing_is_refused_at_once(folder: Path) -> None:
    for length in (1000, 100, 0):
        os.truncate(folder / "__0_0.distcp", length)
        with pytest.raises(CheckpointError, match=r"__0_0\.distcp is damaged at .*the file ends before it"):
            DistributedCheckpoint(folder)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"weights has no __0_0\.distcp\. Copy the checkpoint again"):
        DistributedCheckpoint(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"has no \.metadata, so it is not a finished"):
        DistributedCheckpoint(folder)


def test_a_damaged_byte_gives_an_error_or_other_numbers(folder: Path) -> None:
    """Damage never causes a traceback or a tensor of another shape. Numbers have no checksum, in any format."""
    path = folder / "__0_0.distcp"
    whole = path.read_bytes()
    refused = 0
    for position in range(0, len(whole), 17):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with DistributedCheckpoint(folder) as checkpoint:
            for name, tensor in TENSORS.items():
                try:
                    shape = checkpoint.read(name).shape
                except CheckpointError:
                    refused += 1
                else:
                    assert shape == tensor.shape
    assert refused > 20


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_code_in_a_checkpoint_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace, evil = tmp_path / "trace", io.BytesIO()
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Runs(trace)))
        archive.writestr("archive/data/0", TENSORS["a"].numpy().tobytes())
    path = folder / "__0_0.distcp"
    offset = path.stat().st_size
    path.write_bytes(path.read_bytes() + evil.getvalue())
    _edit(folder, _set_place("a", offset=offset, length=len(evil.getvalue())))
    with pytest.raises(CheckpointError, match="distcp is damaged at a"):
        DistributedCheckpoint(folder).read("a")
    (folder / ".metadata").write_bytes(pickle.dumps(_Runs(trace)))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read as torch_dist metadata \(a Inert\)"):
        DistributedCheckpoint(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(_Runs(trace)))  # a plain unpickler runs the code
    assert trace.exists()


def test_what_is_no_metadata_is_refused(folder: Path) -> None:
    path = folder / ".metadata"
    whole = path.read_bytes()
    contents = [whole[:length] for length in (0, 1, *range(2, len(whole) - 1, len(whole) // 50))]
    contents += [b"{}", pickle.dumps({"state_dict_metadata": {}}), pickle.dumps([1]), b"\x80\x05N."]
    # These contents claim endless memory.
    contents += [b"\x80\x05\x96" + (2**62).to_bytes(8, "little"), b"\x80\x05\x8e" + b"\xff" * 8]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"\.metadata cannot be read as torch_dist metadata"):
            DistributedCheckpoint(folder)


def _set_attribute(module: str, owner: str, attribute: str) -> bytes:
    """Return pickle opcodes that set an attribute of an imported class or function and leave it on the stack."""
    return f"c{module}\n{owner}\n(N}}(S'{attribute}'\ncbuiltins\nset\nutb".encode()


@pytest.mark.parametrize(
    ("module", "owner", "attribute"),
    [
        ("pathlib", "Path", "is_file"),
        ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata", "__eq__"),
        ("torch.serialization", "_get_layout", "__doc__"),
    ],
)
def test_metadata_that_changes_a_class_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, owner: str, attribute: str
) -> None:
    target = pkgutil.resolve_name(f"{module}:{owner}")
    before = getattr(target, attribute)
    monkeypatch.setattr(target, attribute, before)  # restore it even if the attack works
    (folder / ".metadata").write_bytes(_set_attribute(module, owner, attribute) + b".")
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read as torch_dist metadata"):
        DistributedCheckpoint(folder)
    assert getattr(target, attribute) == before
