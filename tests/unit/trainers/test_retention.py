"""Checkpoints that are removed when a newer one is complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.sources.checkpoints import steps_in
from nemo_upcycle.trainers.kept_checkpoints import kept_for_good
from nemo_upcycle.trainers.lineage import Branch, begin_branch
from nemo_upcycle.trainers.nemo.retention import RetainedCheckpoints
from tests.unit.sources.test_checkpoints import write


def _callback(keep_last: int, keep_every: int | None = None) -> RetainedCheckpoints:
    return RetainedCheckpoints(
        keep_last=keep_last, keep_every=keep_every, every_n_train_steps=5, monitor=None, save_last=True, save_top_k=0
    )


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "removed"),
    [
        (2, None, [4, 9, 14]),
        (3, None, [4, 9]),
        (2, 10, [4, 14]),
        (1, 10, [4, 14]),
        (9, None, []),
    ],
)
def test_removes_the_oldest_that_need_not_be_kept(
    tmp_path: Path, keep_last: int, keep_every: int | None, removed: list[int]
) -> None:
    for step in (4, 9, 14, 19):
        write(tmp_path, step, ending="")
    write(tmp_path, 24)
    found = _callback(keep_last, keep_every)._removable(tmp_path)
    assert [path.name for path in found] == [f"model_name=0--step={step}" for step in removed]


def test_an_incomplete_checkpoint_does_not_count(tmp_path: Path) -> None:
    """If an incomplete checkpoint counted, the only complete checkpoint before the last one could be removed."""
    write(tmp_path, 4, ending="")
    (tmp_path / "model_name=0--step=9" / "weights").mkdir(parents=True)
    write(tmp_path, 14)
    assert _callback(2)._removable(tmp_path) == []


def test_removes_a_half_removed_checkpoint_after_newer_ones(tmp_path: Path) -> None:
    """A new start keeps a half-removed checkpoint that has metadata. The checkpoint would occupy 619 GiB."""
    write(tmp_path, 4, ending="")
    (tmp_path / "model_name=0--step=4" / "weights" / "__0_0.distcp").unlink()
    write(tmp_path, 9)
    assert _callback(2)._removable(tmp_path) == []
    write(tmp_path, 9, ending="")
    write(tmp_path, 14)
    callback = _callback(2)
    assert callback._removable(tmp_path) == [tmp_path / "model_name=0--step=4"]
    callback._begun.add(str(tmp_path / "model_name=0--step=4"))  # a thread is removing it
    assert callback._removable(tmp_path) == []
    assert _callback(3)._removable(tmp_path) == []
    assert _callback(2, keep_every=5)._removable(tmp_path) == []


def test_a_checkpoint_that_the_run_was_rewound_to_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (4, 9, 14):
        write(folder, step, ending="")
    write(folder, 19)
    begin_branch(tmp_path, Branch(2, 10))
    assert [path.name for path in _callback(1)._removable(folder)] == [
        "model_name=0--step=4",
        "model_name=0--step=14",
    ]


def test_an_uneven_interval_keeps_the_next_checkpoint(tmp_path: Path) -> None:
    checkpoints = [tmp_path / f"checkpoints/iter_{step:07d}" for step in range(300, 2000, 300)]
    kept = kept_for_good(checkpoints, 500)
    assert sorted(map(steps_in, kept)) == [600, 1200, 1500]
