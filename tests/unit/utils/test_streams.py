"""Streamed files hold the written data, whether or not the kernel copies it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils import streams
from nemo_upcycle.utils.streams import ByteRange, StreamedFile


DATA = np.random.default_rng(0).bytes(300_000)


@pytest.fixture
def part(tmp_path: Path) -> ByteRange:
    (tmp_path / "source").write_bytes(DATA)
    descriptor = os.open(tmp_path / "source", os.O_RDONLY)
    return ByteRange(tmp_path / "source", descriptor, 777, 200_001)


def _write(path: Path, part: ByteRange) -> None:
    with StreamedFile(path) as file:
        file.write(b"head")
        file.write(np.zeros((7, 0), dtype=np.uint8).data)
        file.copy(part)
        file.write(np.arange(12, dtype=np.uint8).reshape(3, 4).data)
        file.copy(part)


def _failing(number: int) -> Callable[..., int]:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("flush_bytes", [1000, 64 << 20])
@pytest.mark.parametrize("in_kernel", [True, False])
def test_what_is_written_and_copied_stands_in_order(
    tmp_path: Path, part: ByteRange, flush_bytes: int, in_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_FLUSH_BYTES", flush_bytes)
    if not in_kernel:  # the kernel cannot copy between these files, so the stream copies
        monkeypatch.setattr(os, "copy_file_range", _failing(errno.EXDEV))
    _write(tmp_path / "out", part)
    copied = DATA[777 : 777 + 200_001]
    assert (tmp_path / "out").read_bytes() == b"head" + copied + bytes(range(12)) + copied


def test_a_full_disk_is_not_got_round(tmp_path: Path, part: ByteRange, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", _failing(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        _write(tmp_path / "out", part)


@pytest.mark.parametrize("in_kernel", [True, False])
def test_a_source_that_ends_early_is_named(
    tmp_path: Path, part: ByteRange, in_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not in_kernel:
        monkeypatch.delattr(os, "copy_file_range")
    os.truncate(part.path, 100_000)
    with pytest.raises(UpcycleError, match="source ends at byte 100000, 100778 bytes too early"):
        _write(tmp_path / "out", part)
