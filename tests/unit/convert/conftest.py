"""A dense folder to convert, and checkpoints of models that were made from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.models import write_llama, write_tokenizer
from tests.unit.convert.exports import save


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, shards=3))


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    """A copy of the dense folder that a test may change."""
    return Path(shutil.copytree(dense, tmp_path / "copy"))


@pytest.fixture(scope="module")
def saved(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints: an MoE saved by Megatron on one rank and by NeMo on four ranks, and its dense parent."""
    folder = tmp_path_factory.mktemp("saved")
    run_ranks(save, 1, str(dense), str(folder / "one"), True, {}, "")
    run_ranks(save, 4, str(dense), str(folder / "four/weights"), True, {"tp": 2, "ep": 2}, "module.")
    run_ranks(save, 2, str(dense), str(folder / "dense/weights"), False, {"pp": 2}, "module.")
    return folder
