"""Finished data folders in NeMo's data module: the same samples on every rank and for every length of a run."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend_module import blend_data, describe_data
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MARKER
from nemo_upcycle.utils.progress import show_messages
from tests.blends import ORDER, write_blend
from tests.distributed.ranks import run_ranks


SEQUENCE, BATCH = 16, 2
#: Steps between two validations, and batches per validation.
VALIDATION = (2, 3)


@pytest.fixture(scope="module")
def folder(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blend(tmp_path_factory.mktemp("blends") / "blend", tiny_dense)


def _module(folder: Path, dense: Path, **changes: Any) -> Any:
    sizes = {"seq_length": SEQUENCE, "global_batch_size": BATCH, "num_workers": 0}
    return blend_data(str(dense), str(folder), **(sizes | changes))


def _hashes(dataset: Any) -> list[str]:
    return [hashlib.sha256(dataset[number]["tokens"].numpy().tobytes()).hexdigest() for number in range(len(dataset))]


def _samples(folder: Path, dense: Path, steps: int, options: dict[str, Any]) -> dict[str, list[str]]:
    """Return the hashes of the samples that training and validation read on this rank."""
    every, batches = options.pop("validation", VALIDATION)
    module = _module(folder, dense, **options)
    module.build(steps, every, batches, 0)
    return {"train": _hashes(module._train_ds), "validation": _hashes(module._validation_ds)}


def _read(folder: Path, dense: Path, steps: int, ranks: int = 1, **options: Any) -> Any:
    found = run_ranks(_samples, ranks, folder, dense, steps, options)
    assert all(samples == found[0] for samples in found)
    return found[0]


def test_a_longer_run_sees_the_same_first_samples(folder: Path, tiny_dense: Path) -> None:
    """The longest run reads its data three times."""
    short, long, longest = (_read(folder, tiny_dense, steps) for steps in (2, 60, 600))
    for read in (short, long):
        assert longest["train"][: len(read["train"])] == read["train"]
        assert longest["validation"] == read["validation"]
    assert len(set(long["train"][: 60 * BATCH])) == 60 * BATCH
    # Bridge reads the data in the same order.
    assert hashlib.sha256("".join(longest["train"][:1200]).encode()).hexdigest() == ORDER
    assert _read(folder, tiny_dense, 60, seed=7)["train"][:100] != long["train"][:100]


def test_a_continued_training_reads_further_in_the_data(folder: Path, tiny_dense: Path) -> None:
    read_before = 350  # this position is in the second epoch
    whole = _read(folder, tiny_dense, 300)
    behind = _read(folder, tiny_dense, 20, ranks=2, skip_samples=read_before)
    assert behind["train"][: 20 * BATCH] == whole["train"][read_before : read_before + 20 * BATCH]
    assert behind["validation"] == whole["validation"]


def test_validation_is_laid_out_for_one_of_them(folder: Path, tiny_dense: Path) -> None:
    validation = _read(folder, tiny_dense, 60, validation=(1, 3))["validation"]
    assert 3 * BATCH <= len(validation) <= 3 * BATCH + 2
    assert validation == _read(folder, tiny_dense, 60, validation=(30, 3))["validation"]


def test_whole_validation_split_is_read_once(folder: Path, tiny_dense: Path) -> None:
    validation = _read(folder, tiny_dense, 2, validation=(1, 1.0))["validation"]
    assert len(validation) == len(set(validation))
    assert len(validation) > 3 * BATCH + 2
    assert _read(folder, tiny_dense, 2, validation=(1, 0))["validation"] == []


def test_two_ranks_build_the_cache_once(tiny_dense: Path, tmp_path: Path) -> None:
    folder = write_blend(tmp_path / "blend", tiny_dense)
    found = _read(folder, tiny_dense, 60, ranks=2)
    built = _stats(folder)
    assert (folder / "indices" / MARKER).is_file()
    assert _read(folder, tiny_dense, 60, ranks=2) == found
    assert _stats(folder) == built
    _read(folder, tiny_dense, 2, ranks=2)
    added = _stats(folder).keys() - built.keys()
    # The shorter run adds only its interleaving of the sources.
    assert {name.split("-")[1] for name in added} == {"BlendedDataset"}


def _stats(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "indices").glob("*.npy")}


def test_indices_may_lie_elsewhere(folder: Path, tiny_dense: Path, tmp_path: Path) -> None:
    """The indices of other data in the same folder are kept."""
    other = write_blend(tmp_path / "other", tiny_dense, blend="other")
    for data in (folder, other):
        assert _read(data, tiny_dense, 2, indices=str(tmp_path / "shared")) == _read(folder, tiny_dense, 2)
    assert len({path.parent for path in (tmp_path / "shared").glob("*/*.npy")}) == 2


def test_first_rank_says_what_the_run_reads(folder: Path, tiny_dense: Path) -> None:
    first, second = run_ranks(_said, 2, folder, tiny_dense, 2, {})
    assert second == ""
    assert first.splitlines() == [
        "data: blend tiny, 6,120 tokens; 2 steps read 64 tokens",
        "  books: 30.0 % of the run, 0.01 epochs of 2,490 tokens",
        "  talks: 70.0 % of the run, 0.01 epochs of 3,630 tokens",
    ]


@pytest.mark.parametrize(
    ("steps", "read_before", "warned"), [(640, 0, False), (660, 0, True), (320, 600, False), (320, 700, True)]
)
def test_too_many_epochs_are_told(folder: Path, tiny_dense: Path, steps: int, read_before: int, warned: bool) -> None:
    """Source talks (3,630 tokens) gives 70 % of 32 tokens per step, so 4 epochs end at step 648 (1,296 sequences)."""
    (said,) = run_ranks(_said, 1, folder, tiny_dense, steps, {"skip_samples": read_before})
    assert (f"already trained on {16 * read_before:,} tokens of this blend" in said) is bool(read_before)
    assert f"{steps} steps read {32 * steps:,} tokens" in said, "what it reads itself stays what it is"
    assert ("data: source talks is read 4.1 times" in said) is warned
    assert "source books" not in said


def _said(folder: Path, dense: Path, steps: int, options: dict[str, Any]) -> str:
    """Return the messages that this rank logs."""
    text = io.StringIO()
    show_messages().addHandler(logging.StreamHandler(text))
    _module(folder, dense, **options).build(steps, *VALIDATION, 0)
    return text.getvalue()


def test_data_are_checked_before_they_are_trained_on(tiny_dense: Path, tmp_path: Path) -> None:
    folder = write_blend(tmp_path / "blend", tiny_dense, tokenizer={"sha256": "0" * 64})
    with pytest.raises(UpcycleError, match="tokenizer of "):
        _module(folder, tiny_dense)


def test_data_are_named_for_the_report(folder: Path, tiny_dense: Path) -> None:
    from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
    from nemo.collections.llm.gpt.data import MockDataModule, PreTrainingDataModule

    module = _module(folder, tiny_dense)
    assert describe_data(module) == "blend tiny (blend)"
    assert describe_data(MockDataModule(tokenizer=NullTokenizer(100))) == "NeMo's mock data (random tokens)"
    file = module.build_kwargs["blend_per_split"][0][0][0]
    assert describe_data(PreTrainingDataModule(file, tokenizer=module.tokenizer)) == "PreTrainingDataModule"


def test_checkpoint_keeps_what_makes_the_module_again(folder: Path, tiny_dense: Path) -> None:
    from nemo.lightning.io import reinit

    again = reinit(_module(folder, tiny_dense))
    assert again.blend.folder == folder.resolve()
