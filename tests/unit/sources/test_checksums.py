"""A flipped bit in a checkpoint is found, and the run falls back to the checkpoint before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.checksums import trusted_checkpoint, write_checksums, wrong_files
from tests.unit.sources.test_checkpoints import write


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _aside(checkpoint: Path) -> Path:
    return checkpoint.rename(checkpoint.parent.parent / checkpoint.name)


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoints"
    for step in (1, 3):
        write_checksums(write(folder, step), 0)
    return folder


def _shards(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.rglob("*.distcp"))


def test_whole_checkpoints_are_trusted(checkpoints: Path) -> None:
    newest = max(checkpoints.iterdir())
    assert wrong_files(newest) == []
    assert trusted_checkpoint(checkpoints, _aside) == newest


def test_a_flipped_bit_sends_a_run_back_one_checkpoint(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    older, newest = sorted(checkpoints.iterdir())
    _flip_a_bit(_shards(newest)[-1])
    assert trusted_checkpoint(checkpoints, _aside) == older
    assert not newest.exists()
    assert f"{_shards(older)[-1].name} differs from what was written" in caplog.text
    assert f"{newest} is damaged and was moved to {checkpoints.parent / newest.name}" in caplog.text


def test_no_run_starts_again_because_all_checkpoints_are_damaged(checkpoints: Path) -> None:
    for checkpoint in checkpoints.iterdir():
        _flip_a_bit(_shards(checkpoint)[0])
    with pytest.raises(CheckpointError, match="is damaged, and so is every earlier one"):
        trusted_checkpoint(checkpoints, _aside)
    assert len(list(checkpoints.iterdir())) == 2


def test_a_checkpoint_without_checksums_is_trusted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checkpoint = write(tmp_path / "checkpoints", 1)
    _flip_a_bit(_shards(checkpoint)[0])
    assert trusted_checkpoint(checkpoint.parent, _aside) == checkpoint
