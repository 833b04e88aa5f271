"""Finished data folders in Megatron-Bridge: epoch by epoch, in NeMo's order, however long the run is."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.blends import ORDER, write_blend
from tests.distributed.ranks import run_ranks
from tests.models import write_tokenizer


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
SEQUENCE, BATCH = 16, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = tmp_path_factory.mktemp("blends")
    return write_blend(files / "blend", write_tokenizer(files / "parent"))


def test_order_is_that_of_nemo(folder: Path) -> None:
    (read,) = run_ranks(_read, 1, folder, 600)
    assert hashlib.sha256("".join(read[:1200]).encode()).hexdigest() == ORDER


@pytest.mark.parametrize("steps", [10, 150], ids=["within the first epoch", "in the second epoch"])
def test_resumed_run_goes_on_with_the_next_sample(folder: Path, steps: int) -> None:
    """Also where the first part was laid out for itself alone."""
    (whole,) = run_ranks(_loaded, 1, folder, 300, 0)
    (first,) = run_ranks(_loaded, 1, folder, steps, 0)
    (rest,) = run_ranks(_loaded, 1, folder, 300, steps * BATCH)
    assert first[: steps * BATCH] == whole[: steps * BATCH]
    assert rest == whole[steps * BATCH :]


def test_finished_run_finds_samples_when_it_starts_again(folder: Path) -> None:
    (rest,) = run_ranks(_loaded, 1, folder, 20, 20 * BATCH)
    assert rest


def _datasets(folder: Path, steps: int) -> tuple[Any, Any, None]:
    from megatron.bridge.data.base import DatasetBuildContext
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    from nemo_upcycle.trainers.bridge.blend import BlendDataset

    init_num_microbatches_calculator(0, None, BATCH, 1, 1)
    context = DatasetBuildContext(steps * BATCH, 6, 6, NullTokenizer(300))
    return BlendDataset(folder=str(folder), seq_length=SEQUENCE).build_datasets(context)


def _hash(sample: Any) -> str:
    return hashlib.sha256(sample["tokens"].numpy().tobytes()).hexdigest()


def _read(folder: Path, steps: int) -> list[str]:
    """Read what training reads on this rank."""
    train, _, _ = _datasets(folder, steps)
    return [_hash(train[number]) for number in range(len(train))]


def _loaded(folder: Path, steps: int, consumed: int) -> list[str]:
    """Return what Bridge's loader reads of a run after so many samples."""
    from megatron.bridge.data.samplers import build_pretraining_data_loader

    train, _, _ = _datasets(folder, steps)
    loader = build_pretraining_data_loader(train, consumed, "single", 1, 0, False, pin_memory=False)
    return [_hash({"tokens": tokens}) for batch in loader for tokens in batch["tokens"]]
