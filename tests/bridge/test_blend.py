"""Megatron-Bridge reads finished data folders epoch by epoch, in NeMo's order, however long the run is.

`find` lists exactly the samples that Megatron-Bridge reads.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from nemo_upcycle.data.find import Reading, find_documents, find_samples
from nemo_upcycle.data.finished import open_blend
from tests.blends import ORDER, mark_documents, write_blend
from tests.distributed.ranks import run_ranks
from tests.models import write_tokenizer


SEQUENCE, BATCH = 16, 2


def test_order_is_that_of_nemo(tmp_path: Path) -> None:
    (read,) = run_ranks(_read, 1, write_blend(tmp_path / "blend", write_tokenizer(tmp_path / "parent")), 600)
    assert hashlib.sha256("".join(read[:1200]).encode()).hexdigest() == ORDER


def test_found_samples_are_those_that_bridge_reads(tmp_path: Path) -> None:
    folder = write_blend(tmp_path / "blend", write_tokenizer(tmp_path / "parent"))
    marks = mark_documents(folder)
    (read,) = run_ranks(_marks_read, 1, folder, 600)
    blend = open_blend(folder)
    found = [one for name in marks for n in range(len(marks[name])) for one in find_documents(blend, f"{name}:{n}")]
    assert len(found) == 150
    for one, where in zip(found, find_samples(blend, found, Reading(SEQUENCE, 1234, 1200, BATCH)), strict=True):
        mark = marks[one.source][one.first]
        assert where.samples.tolist() == [number for number, tokens in enumerate(read[:1200]) if mark in tokens]


def _read(folder: Path, steps: int) -> list[str]:
    """Return the token hashes of all samples that training reads on this rank."""
    return [hashlib.sha256(sample["tokens"].numpy().tobytes()).hexdigest() for sample in _samples(folder, steps)]


def _marks_read(folder: Path, steps: int) -> list[set[int]]:
    """Return the tokens that the model reads or predicts in each sample."""
    return [{*sample["tokens"].tolist(), *sample["labels"].tolist()} for sample in _samples(folder, steps)]


def _samples(folder: Path, steps: int) -> list[Any]:
    """Return all samples of a training on this rank."""
    from megatron.bridge.data.base import DatasetBuildContext
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    from nemo_upcycle.trainers.bridge.blend import BlendDataset

    init_num_microbatches_calculator(0, None, BATCH, 1, 1)
    context = DatasetBuildContext(steps * BATCH, 6, 6, NullTokenizer(300))
    train, _, _ = BlendDataset(folder=str(folder), seq_length=SEQUENCE).build_datasets(context)
    return [train[number] for number in range(len(train))]
