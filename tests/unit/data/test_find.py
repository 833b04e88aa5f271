"""The samples and steps that `find` lists are those with tokens of the documents in NeMo's own data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_upcycle.data.blend_module import blend_data
from nemo_upcycle.data.find import Documents, Reading, find_documents, find_samples, ranges_of
from nemo_upcycle.data.finished import FinishedBlend, open_blend
from nemo_upcycle.data.skipped_samples import SkippedSamples
from tests.blends import SOURCES, mark_documents, write_blend
from tests.distributed.ranks import run_ranks


SEQUENCE, BATCH, SEED = 16, 2, 1234
#: The longest run reads its data three times.
STEPS = 600
#: A blend with one source in one file, and a blend with two sources, one of them in two files.
BLENDS: dict[str, Any] = {"one source": {"talks": SOURCES["talks"]}, "two sources": SOURCES}


def _read(folder: Path, dense: Path, steps: int, options: dict[str, Any]) -> list[set[int]]:
    """Return the set of tokens that the model reads or predicts in each sample of NeMo's training."""
    sizes = {"seq_length": SEQUENCE, "global_batch_size": BATCH, "num_workers": 0}
    module = blend_data(str(dense), str(folder), **sizes, **options)
    module.build(steps, steps, 1, 0)
    samples = (module._train_ds[number] for number in range(steps * BATCH))
    return [{*sample["tokens"].tolist(), *sample["labels"].tolist()} for sample in samples]


@pytest.fixture(scope="module", params=BLENDS)
def marked(request: Any, tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A blend in which all tokens of a document are the document's own number, and these numbers."""
    folder = write_blend(tmp_path_factory.mktemp("marked") / "blend", tiny_dense, BLENDS[request.param])
    return folder, mark_documents(folder)


def _every(blend: FinishedBlend, marks: dict[str, list[int]]) -> list[Documents]:
    return [
        one for source in marks for n in range(len(marks[source])) for one in find_documents(blend, f"{source}:{n}")
    ]


def _compare(folder: Path, marks: dict[str, list[int]], read: list[set[int]], skipped: SkippedSamples) -> None:
    """Check samples and steps of every document; `read` are the marks in each sample, in the order of the training."""
    blend = open_blend(folder)
    found = _every(blend, marks)
    assert len(found) == sum(map(len, marks.values()))
    reading = Reading(SEQUENCE, SEED, len(read), BATCH, skipped)
    for one, where in zip(found, find_samples(blend, found, reading), strict=True):
        places = [place for place, tokens in enumerate(read) if marks[one.source][one.first] in tokens]
        assert where.samples.tolist() == [skipped.sample_at(place) for place in places]
        assert where.steps.tolist() == sorted({place // BATCH + 1 for place in places})


def test_samples_and_steps_are_those_that_nemo_reads(marked: tuple[Path, Any], tiny_dense: Path) -> None:
    folder, marks = marked
    (read,) = run_ranks(_read, 1, folder, tiny_dense, STEPS, {})
    _compare(folder, marks, read, SkippedSamples())
    _compare(folder, marks, read[:7], SkippedSamples())  # a short run, which ends within a step and an epoch


def test_skipped_start_of_a_continued_training_moves_steps(marked: tuple[Path, Any], tiny_dense: Path) -> None:
    folder, marks = marked
    (read,) = run_ranks(_read, 1, folder, tiny_dense, 40, {"skip_samples": 351})
    _compare(folder, marks, read, SkippedSamples.of([(0, 351)]))


def test_skipped_samples_move_the_steps_after_them(marked: tuple[Path, Any], tiny_dense: Path) -> None:
    folder, marks = marked
    (read,) = run_ranks(_read, 1, folder, tiny_dense, 60, {})
    skipped = SkippedSamples.of([(4, 9), (30, 31)])
    left = [read[skipped.sample_at(place)] for place in range(100)]
    _compare(folder, marks, left, skipped)


def test_source_has_the_samples_of_all_its_documents(marked: tuple[Path, Any]) -> None:
    folder, marks = marked
    blend, reading = open_blend(folder), Reading(SEQUENCE, SEED, 900, BATCH)
    found = _every(blend, marks)
    for source in marks:
        (whole,) = find_samples(blend, [*find_documents(blend, source)], reading)
        parts = [one for one in find_samples(blend, found, reading) if one.documents.source == source]
        assert whole.documents == Documents(source, 0, len(parts) - 1, sum(one.documents.tokens for one in parts))
        assert whole.samples.tolist() == sorted({n for one in parts for n in one.samples.tolist()})


def test_order_needs_no_file_in_the_data_folder(marked: tuple[Path, Any]) -> None:
    folder, _ = marked
    before = sorted(folder.rglob("*"))
    find_samples(blend := open_blend(folder), [*find_documents(blend, "talks:3")], Reading(SEQUENCE, SEED, 20))
    assert sorted(folder.rglob("*")) == before


def test_number_beyond_the_last_document_is_not_found(marked: tuple[Path, Any]) -> None:
    blend = open_blend(marked[0])
    assert [*find_documents(blend, "talks:89")] != []
    for number in ("90", "9" * 5000):
        assert [*find_documents(blend, f"talks:{number}")] == []


def test_text_is_found_in_every_document_that_has_it(tiny_dense: Path, tmp_path: Path) -> None:
    texts = ["a good text", "a poisoned\ntext", "another", "poison", "twice poisoned, poisoned"]
    blend = open_blend(write_blend(tmp_path / "blend", tiny_dense, texts={"train": texts, "validation": texts}))
    assert [one.first for one in find_documents(blend, "poisoned")] == [1, 4]
    assert [one.first for one in find_documents(blend, "poisoned\nt")] == [1]
    assert [*find_documents(blend, "goodanother")] == []
    assert [*find_documents(blend, "texta")] == []


def test_numbers_in_a_row_become_ranges() -> None:
    assert ranges_of(np.array([], np.int64)) == []
    assert ranges_of(np.array([5])) == [(5, 5)]
    assert ranges_of(np.array([0, 1, 2, 4, 9, 10])) == [(0, 2), (4, 4), (9, 10)]
