"""Slices of tensors in files: the right bits, fetched without a byte beyond them, and files that end too early."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.mapped_files import MappedFiles, Stored, row_major
from tests.waiting import wait_until


MIB = 1 << 20


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slice_of_any_layout_has_the_right_bits_and_lies_where_it_is_said_to(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
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
    with pytest.raises(CheckpointError, match=r"norm: slice .* reaches beyond its shape \[4, 3\]"):
        MappedFiles(tmp_path).read("norm", Stored("f", torch.float32, (4, 3), (3, 1), 0), bounds)


def _cached(path: Path) -> list[bool]:
    """Return which pages of a file are in the page cache; asking brings none there."""
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * (len(mapped) // mmap.PAGESIZE))()
        address = ctypes.addressof(start := ctypes.c_char.from_buffer(mapped))
        failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), pages)
        del start
        assert not failed
    return [bool(page & 1) for page in pages]


def _megabytes(*ranges: tuple[float, float]) -> list[bool]:
    """Return for every page of 32 MiB whether it lies in one of the ranges."""
    pages = MIB // mmap.PAGESIZE
    return [any(a * pages <= page < b * pages for a, b in ranges) for page in range(32 * pages)]


def _is_fetched(path: Path, *ranges: tuple[float, float]) -> bool:
    """Return whether these parts of the file are there and no others; the kernel may have dropped some pages again."""
    cached, wanted = _cached(path), _megabytes(*ranges)
    inside = sum(is_there for is_there, is_wanted in zip(cached, wanted, strict=True) if is_wanted)
    return sum(cached) == inside and inside > sum(wanted) / 2


@pytest.fixture
def cold(tmp_path: Path) -> Path:
    """A file of 32 MiB that is on the disk and not in the page cache."""
    path = tmp_path / "f"
    path.write_bytes(bytes(range(256)) * (32 * MIB // 256))
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if any(_cached(path)):
        pytest.skip("this file system keeps its files in memory")
    return path


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux")
def test_a_cold_slice_is_fetched_and_nothing_beyond_it_of_columns_the_rows(cold: Path, tmp_path: Path) -> None:
    files, stored = MappedFiles(tmp_path), Stored("f", torch.uint8, (32, MIB), (MIB, 1), 0)
    part = files.read("t", stored, [(9, 18), (0, MIB)])
    assert _is_fetched(cold, (9, 18))  # before the view is touched
    assert torch.equal(part[0, :256], torch.arange(256, dtype=torch.uint8))
    files.prefetch("t", stored, [(20, 22), (0, MIB)])
    wait_until(lambda: _is_fetched(cold, (9, 18), (20, 22)))
    files.read("t", stored, [(4, 8), (MIB // 2, MIB // 2 + mmap.PAGESIZE)])
    assert _is_fetched(cold, (4.5, 7.5 + mmap.PAGESIZE / MIB), (9, 18), (20, 22))
    files.close()


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux")
def test_a_file_that_got_shorter_is_an_error_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(64 * 1024))
    files = MappedFiles(tmp_path)
    stored = Stored("f", torch.float32, (16, 1024), (1024, 1), 0)
    files.read("t", stored, [(0, 1), (0, 1024)])
    os.truncate(tmp_path / "f", 8 * 4096)
    with pytest.raises(CheckpointError, match=r"f: got the end of the file, expected to read bytes 32768 to 65536"):
        files.read("t", stored)


def test_released_pages_come_back(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\x07" * 8192)
    files = MappedFiles(tmp_path)
    part = files.read("t", Stored("f", torch.uint8, (8192,), (1,), 0))
    files.release()
    assert part.eq(7).all()
