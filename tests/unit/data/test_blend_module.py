"""Finished data folders in NeMo's data module: the same samples for every length of a run, on every rank."""

from __future__ import annotations

import hashlib
import io
import logging
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend_module import blend_data, describe_data
from nemo_upcycle.data.blend_samples import require_samples
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MARKER
from nemo_upcycle.utils.progress import show_messages
from tests.blends import set_manifest, write_blend
from tests.distributed.ranks import run_ranks


SEQUENCE, BATCH = 16, 2
#: Steps between two validations, and batches of each.
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
    """Return what training and validation read, on this rank."""
    from nemo.collections.llm.gpt.data import PreTrainingDataModule

    every, batches = options.pop("validation", VALIDATION)
    is_pinned = options.pop("is_pinned", True)
    module = _module(folder, dense, **options)
    if is_pinned:
        module.build(steps, every, batches, 0)
    else:
        module.num_train_samples = None
        PreTrainingDataModule.build(module, steps, every, batches, 0)
    return {"train": _hashes(module._train_ds), "validation": _hashes(module._validation_ds)}


def _read(folder: Path, dense: Path, steps: int, ranks: int = 1, **options: Any) -> Any:
    found = run_ranks(_samples, ranks, folder, dense, steps, options)
    assert all(samples == found[0] for samples in found)
    return found[0]


def test_longer_run_sees_the_same_first_samples(folder: Path, tiny_dense: Path) -> None:
    short, long = (_read(folder, tiny_dense, steps) for steps in (2, 60))
    assert long["train"] == short["train"]
    assert len(set(long["train"][: 60 * BATCH])) == 60 * BATCH
    assert long["validation"] == short["validation"]


def test_nemo_alone_reshuffles_a_longer_run(folder: Path, tiny_dense: Path) -> None:
    """What the number of samples is pinned for."""
    first = 40
    short, long = (_read(folder, tiny_dense, steps, is_pinned=False)["train"] for steps in (first, 400))
    assert sum(one == other for one, other in zip(short[:first], long[:first], strict=True)) < first // 2


def test_batch_sizes_do_not_change_the_order(folder: Path, tiny_dense: Path) -> None:
    one, other = (_read(folder, tiny_dense, 2, global_batch_size=size)["train"] for size in (2, 6))
    assert one == other


@pytest.mark.parametrize("change", [{"seed": 7}, {"run_tokens": 100_000}])
def test_seed_and_longest_run_change_the_order(folder: Path, tiny_dense: Path, change: dict[str, int]) -> None:
    usual, other = _read(folder, tiny_dense, 2)["train"], _read(folder, tiny_dense, 2, **change)["train"]
    assert other[:100] != usual[:100]


def test_sources_are_mixed_by_their_weights(folder: Path, tiny_dense: Path) -> None:
    (sources,) = run_ranks(_sources, 1, folder, tiny_dense)
    assert sources.count("talks") / len(sources) == pytest.approx(0.7, abs=0.02)
    assert sources[:40].count("talks") == pytest.approx(28, abs=2)


def _sources(folder: Path, dense: Path) -> list[str]:
    module = _module(folder, dense)
    module.build(2, *VALIDATION, 0)
    blended = module._train_ds
    names = [Path(dataset.dataset_path).name.split("_")[0] for dataset in blended.datasets]
    return [names[number] for number in blended.dataset_index]


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
    found = _read(folder, tiny_dense, 2, ranks=2)
    built = _stats(folder)
    assert (folder / "indices" / MARKER).is_file()
    assert _read(folder, tiny_dense, 60, ranks=2) == found
    assert _stats(folder) == built


def _stats(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "indices").glob("*.npy")}


def test_index_cut_short_is_built_again(tiny_dense: Path, tmp_path: Path) -> None:
    folder = write_blend(tmp_path / "blend", tiny_dense)
    found = _read(folder, tiny_dense, 2)
    for path in (folder / "indices").glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-8])
    assert _read(folder, tiny_dense, 2) == found


def test_indices_may_lie_elsewhere(folder: Path, tiny_dense: Path, tmp_path: Path) -> None:
    """Those of other data in the same folder stay."""
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


@pytest.mark.parametrize(("steps", "warned"), [(640, False), (660, True)])
def test_more_epochs_than_the_blend_allows_are_warned_of(
    folder: Path, tiny_dense: Path, steps: int, *, warned: bool
) -> None:
    """Talks, 3,630 tokens, are 70 % of 32 tokens a step: 4 epochs end with step 648."""
    (said,) = run_ranks(_said, 1, folder, tiny_dense, steps, {"run_tokens": 100_000})
    assert ("data: source talks is read 4.1 times, more often than max_epochs (4)" in said) is warned
    assert "source books" not in said


def _said(folder: Path, dense: Path, steps: int, options: dict[str, Any]) -> str:
    """Return this rank's messages."""
    text = io.StringIO()
    show_messages().addHandler(logging.StreamHandler(text))
    _module(folder, dense, **options).build(steps, *VALIDATION, 0)
    return text.getvalue()


def test_run_longer_than_its_order_is_refused_with_the_setting(folder: Path, tiny_dense: Path) -> None:
    module = _module(folder, tiny_dense)
    longest = module.num_train_samples // BATCH
    require_samples(longest, BATCH, SEQUENCE, module.num_train_samples)
    with pytest.raises(UpcycleError, match=rf"trainer\.max_steps: got {longest + 1}, .*at most {longest}") as error:
        module.build(longest + 1, *VALIDATION, 0)
    tokens = int(str(error.value).partition("data.run_tokens=")[2].partition(",")[0])
    longer = _module(folder, tiny_dense, run_tokens=tokens)
    require_samples(longest + 1, BATCH, SEQUENCE, longer.num_train_samples)


def test_data_are_checked_before_they_are_trained_on(tiny_dense: Path, tmp_path: Path) -> None:
    folder = write_blend(tmp_path / "blend", tiny_dense, tokenizer={"sha256": "0" * 64})
    with pytest.raises(UpcycleError, match="tokenizer of "):
        _module(folder, tiny_dense)
    set_manifest(folder, format=0)
    with pytest.raises(UpcycleError, match="format of "):
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
    assert again.num_train_samples == _module(folder, tiny_dense).num_train_samples
