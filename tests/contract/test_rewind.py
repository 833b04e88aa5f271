"""A rewound training: the same bits without changes, other rates from the step on, and skipped samples."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.sources.checkpoints import complete_checkpoints, steps_in
from nemo_upcycle.trainers.earlier_branch import move_earlier
from nemo_upcycle.trainers.lineage import Branch, begin_branch, end_move
from tests.contract.packs import write_packs
from tests.contract.trainers import IS_BRIDGE, differing, losses, metrics, train, training_text, weights
from tests.functional.tiny import BATCH


#: Values that the two trainings of a comparison must share.
COMPARED = ("loss", "grad_norm", "lr", "router")
#: Folders of the present and the earlier branch, relative to the training's folder.
PLACES = (".", "branches/1")


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training of six steps on one rank."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(training_text(), folder, *inputs)
    return folder


def rewind(folder: Path, branch: Branch) -> None:
    """Rewind a training as the pipeline does."""
    begin_branch(folder, branch)
    move_earlier(folder)
    end_move(folder)


def lines(folder: Path) -> list[list[object]]:
    """Return the compared values of every step."""
    return [[line[name] for name in COMPARED] for line in metrics(folder)]


def test_a_rewind_without_changes_gives_the_same_bits(inputs: tuple[Path, Path], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(training_text(), folder, *inputs)
    rewind(folder, Branch(2, 2))
    kept, aside = ([steps_in(one) for one in complete_checkpoints(folder / place / "checkpoints")] for place in PLACES)
    assert kept == [2]
    assert {4, 6} <= set(aside)  # NeMo also saves after a validation
    train(training_text(), folder, *inputs)
    assert lines(folder) == lines(folder / "branches/1") == lines(whole)
    assert differing(weights(folder), weights(whole)) == []


@pytest.mark.parametrize("changed", [{"lr": 3e-4}, {"lr": 3e-4, "min_lr": 1e-6, "warmup": 5}], ids=str)
def test_a_rewound_run_takes_the_rates_of_its_settings(
    inputs: tuple[Path, Path], whole: Path, tmp_path: Path, changed: dict[str, float]
) -> None:
    expected, folder = tmp_path / "expected", tmp_path / "run"
    train(training_text(changed), expected, *inputs)
    train(training_text(), folder, *inputs)
    rewind(folder, Branch(2, 2, changes={"lr": ("0.001", "0.0003")}))
    with pytest.raises(RuntimeError, match="rank 0 died"):
        train(training_text(changed), folder, *inputs, kill_at=7)  # four steps, a validation and the branch's line
    train(training_text(changed), folder, *inputs)
    assert losses(folder, "lr") == losses(whole, "lr")[:2] + losses(expected, "lr")[2:]
    assert losses(folder)[:3] == losses(whole)[:3]  # the loss of a step is computed before its update
    assert losses(folder)[3] != losses(whole)[3]


def test_old_checkpoints_are_removed_but_one_every_few_steps(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    newest = "checkpoint.most_recent_k" if IS_BRIDGE else "log.ckpt.keep_last"
    every = "upcycle.keep_every" if IS_BRIDGE else "log.ckpt.keep_every"
    train(training_text({"steps": 8, newest: 1, every: 4}), tmp_path / "run", *inputs)
    assert [steps_in(one) for one in complete_checkpoints(tmp_path / "run/checkpoints")] == [4, 8]


def leaves_out(kind: str, folder: Path, parent: Path, data: Path) -> None:
    """Rewind eight steps to step 2, without steps 4 and 5. With a rate of zero, a loss depends only on samples."""
    still = training_text({"steps": 8, "lr": 0.0, "min_lr": 0.0}, kind=kind)
    train(still, folder, parent, data)
    seen = losses(folder)
    assert len(set(seen)) == 8
    rewind(folder, Branch(2, 2, ((4, 5),), ((3 * BATCH, 5 * BATCH),)))
    train(still, folder, parent, data)
    assert losses(folder)[:6] == [*seen[:3], *seen[5:]]


def test_a_rewound_run_leaves_out_the_skipped_steps(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    leaves_out("moe", tmp_path / "run", *inputs)


def test_a_rewound_tuning_leaves_out_the_skipped_steps(tmp_path: Path) -> None:
    leaves_out("moe_sft", tmp_path / "run", *write_packs(tmp_path))
