"""The index cache has only complete files of the current data; a validation interval longer than the run is cut."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.data.blend_samples import clamp_interval, require_few_epochs, whole_indices
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.files import MARKER, read_json
from nemo_upcycle.utils.progress import show_messages
from tests.waiting import HANG_S, wait_until


@pytest.mark.parametrize(
    ("interval", "batches", "clamped", "said"),
    [(2000, 1, 4, True), (4, 1, 4, True), (3, 1, 3, False), (1.0, 1, 1.0, False), (2000, 0, 4, False)],
)
def test_an_interval_beyond_the_run_is_reported(
    interval: float, batches: int, clamped: float, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = SimpleNamespace(max_steps=3, val_check_interval=interval, limit_val_batches=batches)
    with temporarily_set(show_messages(), "propagate", True):
        clamp_interval(trainer)
    assert trainer.val_check_interval == clamped
    assert any(record.name == "nemo_upcycle" for record in caplog.records) is said


def test_the_demos_texts_are_not_read_a_thousand_times() -> None:
    blend: Any = SimpleNamespace(manifest={"splits": {"train": {"tokens": 1000}}})
    require_few_epochs(blend, 100_000)
    with pytest.raises(UpcycleError, match="would read the demo's speeches 1,000 times"):
        require_few_epochs(blend, 1_000_000)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    (tmp_path / "manifest.json").write_text("{}")
    return tmp_path / "manifest.json"


def _built(cache: Path, manifest: Path, **files: str) -> None:
    with whole_indices(cache, manifest):
        for name, text in files.items():
            _index(cache, name).write_text(text)


def _index(cache: Path, name: str) -> Path:
    return cache / f"{'0' * 32}-GPTDataset-train-{name}.npy"


def _names(cache: Path) -> set[str]:
    return {path.stem.rpartition("-")[2] for path in cache.glob("*.npy")}


def test_files_of_a_finished_build_stay_and_more_are_added(manifest: Path) -> None:
    cache = manifest.with_name("indices")
    _built(cache, manifest, train="one")
    written_ns = (cache / MARKER).stat().st_mtime_ns
    _built(cache, manifest)
    assert (cache / MARKER).stat().st_mtime_ns == written_ns
    _built(cache, manifest, validation="two")
    assert _names(cache) == {"train", "validation"}
    assert read_json(cache / MARKER)["files"] == {_index(cache, name).name: 3 for name in ("train", "validation")}


def test_files_cut_short_and_of_a_killed_build_are_deleted(manifest: Path) -> None:
    cache = manifest.with_name("indices")
    _built(cache, manifest, whole="whole", cut="whole")
    for name in ("cut", "killed"):
        _index(cache, name).write_text("who")
    (cache / "notes.txt").write_text("of somebody else")
    _built(cache, manifest)
    assert _names(cache) == {"whole"}
    assert (cache / "notes.txt").is_file()


def test_indices_of_other_data_are_deleted(manifest: Path) -> None:
    cache = manifest.with_name("indices")
    _built(cache, manifest, old="old")
    manifest.write_text('{"seed": 1}')
    _built(cache, manifest, new="new")
    assert _names(cache) == {"new"}


def test_second_run_waits_for_the_first(manifest: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = manifest.with_name("indices")
    with temporarily_set(show_messages(), "propagate", True), whole_indices(cache, manifest):
        second = Thread(target=_built, args=(cache, manifest), kwargs={"second": "two"})
        second.start()
        wait_until(lambda: "waiting for another run" in caplog.text)
        assert _names(cache) == set()
        _index(cache, "first").write_text("one")
    second.join(HANG_S)
    assert _names(cache) == {"first", "second"}


def test_a_read_only_cache_is_an_error_with_a_fix(manifest: Path) -> None:
    cache = manifest.with_name("indices")
    cache.write_text("a file")
    with pytest.raises(UpcycleError, match=r"Index cache .*indices cannot be written: .*\. Let"):
        _built(cache, manifest)
