"""Megatron-Bridge reads finished data folders epoch by epoch, in NeMo's order, however long the run is."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.blends import ORDER, write_blend
from tests.distributed.ranks import run_ranks
from tests.models import write_tokenizer


SEQUENCE, BATCH = 16, 2


def test_order_is_that_of_nemo(tmp_path: Path) -> None:
    (read,) = run_ranks(_read, 1, write_blend(tmp_path / "blend", write_tokenizer(tmp_path / "parent")), 600)
    assert hashlib.sha256("".join(read[:1200]).encode()).hexdigest() == ORDER


def _read(folder: Path, steps: int) -> list[str]:
    """Return the token hashes of all samples that training reads on this rank."""
    from megatron.bridge.data.base import DatasetBuildContext
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    from nemo_upcycle.trainers.bridge.blend import BlendDataset

    init_num_microbatches_calculator(0, None, BATCH, 1, 1)
    context = DatasetBuildContext(steps * BATCH, 6, 6, NullTokenizer(300))
    train, _, _ = BlendDataset(folder=str(folder), seq_length=SEQUENCE).build_datasets(context)
    return [hashlib.sha256(train[number]["tokens"].numpy().tobytes()).hexdigest() for number in range(len(train))]
