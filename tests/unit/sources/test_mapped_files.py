"""Slices of tensors in files: the right bits, no byte read beyond a slice, and files that end too early."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.mapped_files import MappedFiles, Stored, row_major


MIB = 1 << 20


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_has_the_right_bits_and_place(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    start, transposed = data.draw(st.integers(0, 9)), data.draw(st.booleans())
    bounds = [tuple(sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in shape]
    stride = row_major(shape[::-1])[::-1] if transposed else row_major(shape)
    whole = torch.arange(torch.Size(shape).numel()).to(dtype)
    folder = tmp_path_factory.mktemp("files")
    (folder / "f").write_bytes(b"x" * start + whole.view(torch.uint8).numpy().tobytes())
    files, stored = MappedFiles(folder), Stored("f", dtype, shape, stride, start)
    got, part = files.read("t", stored, bounds), files.part("t", stored, bounds)
    expected = whole.as_strided(shape, stride)[tuple(slice(*bound) for bound in bounds)]
    assert got.dtype == dtype
    assert torch.equal(got, expected)
    assert files.bytes_read == got.nbytes
    assert (part is not None) == (expected.numel() > 0 and expected.is_contiguous())
    if part:
        stored_bytes = bytearray(os.pread(part.descriptor, part.size_bytes, part.start))
        assert torch.equal(torch.frombuffer(stored_bytes, dtype=dtype), expected.reshape(-1))
    files.close()
    assert torch.equal(got, expected)  # views outlive the files


@pytest.mark.parametrize("bounds", [[(0, 5)], [(0, 4), (0, 4)], [(-1, 2), (0, 3)], [(3, 2), (0, 3)]])
def test_a_slice_beyond_the_tensor_is_refused(tmp_path: Path, bounds: list[tuple[int, int]]) -> None:
    (tmp_path / "f").write_bytes(bytes(48))
    with pytest.raises(CheckpointError, match=r"slice .* of norm reaches beyond its shape \[4, 3\]"):
        MappedFiles(tmp_path).read("norm", Stored("f", torch.float32, (4, 3), (3, 1), 0), bounds)


def test_a_cold_slice_is_fetched_of_columns_the_rows_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[int, int]] = []
    preadv = os.preadv

    def fetch(descriptor: int, buffers: list[memoryview], start: int) -> int:
        fetched.append((start, start + len(buffers[0])))
        return preadv(descriptor, buffers, start)

    monkeypatch.setattr(MappedFiles, "_is_cached", lambda *_: False)
    monkeypatch.setattr(os, "preadv", fetch)
    (tmp_path / "f").touch()
    os.truncate(tmp_path / "f", 32 * MIB)
    files, stored = MappedFiles(tmp_path), Stored("f", torch.uint8, (32, MIB), (MIB, 1), 0)
    for bounds in ([(9, 18), (0, MIB)], [(4, 8), (MIB // 2, MIB // 2 + 4096)]):
        files.prefetch("t", stored, bounds)
        files.read("t", stored, bounds)
    edges = [9 * MIB, 12 * MIB, 16 * MIB, 18 * MIB], [4 * MIB + MIB // 2, 7 * MIB + MIB // 2 + 4096]
    assert sorted(fetched) == sorted(pair for one in edges for pair in pairwise(one))
    files.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux")
def test_a_file_that_got_shorter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(64 * 1024))
    files = MappedFiles(tmp_path)
    stored = Stored("f", torch.float32, (16, 1024), (1024, 1), 0)
    files.read("t", stored, [(0, 1), (0, 1024)])
    os.truncate(tmp_path / "f", 8 * 4096)
    with pytest.raises(CheckpointError, match=r"f cannot be read from byte 32768 to 65536: the file ends before"):
        files.read("t", stored)
