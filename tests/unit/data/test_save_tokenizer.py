"""The tokenizer beside tokenised data is written whole, or not at all."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest

from nemo_upcycle.data.tokenizers import save_tokenizer


def test_a_full_disk_is_an_error_of_the_disk(tiny_dense: Path, tmp_path: Path) -> None:
    save_tokenizer(tiny_dense, tmp_path / "made")
    room = max(path.stat().st_size for path in (tmp_path / "made").iterdir()) - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save_tokenizer(tiny_dense, tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (raised.value.errno, (tmp_path / "full").exists()) == (errno.EFBIG, False)
    save_tokenizer(tiny_dense, tmp_path / "full")
    assert (tmp_path / "full/tokenizer.json").read_bytes() == (tmp_path / "made/tokenizer.json").read_bytes()
