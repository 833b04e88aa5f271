"""Trainings on two ranks that are told to stop or fail: their checkpoints, their ends, and how they resume."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import StageStopped
from nemo_upcycle.trainers.nemo.stopping import step_kept
from tests.functional.runs import Runs
from tests.functional.soak import TRAININGS, soak_training, training_result
from tests.functional.started import under_ft_launcher
from tests.tiers import quick
from tests.waiting import HANG_S


pytestmark = [pytest.mark.slow, pytest.mark.full]
STEPS = 6
STOPPED = StageStopped.exit_status
OPTIONS: dict[str, Any] = {"steps": STEPS, "every": 2, "ep": 2, "resilient": True}
RANK = "tests.functional.ft_rank"
TRAINED = ("step", "loss", "grad_norm", "lr", "expert_load")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("resilience"))


@pytest.fixture(scope="module")
def undisturbed(runs: Runs) -> list[dict[str, Any]]:
    return _trained(runs.train("undisturbed", 2, **OPTIONS))


def _trained(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in TRAINED} for line in lines]


@pytest.mark.parametrize(("ranks", "asynchronous"), quick([([1], True), ([0, 1], False)], ([1], True)), ids=str)
def test_after_sigterm_the_run_resumes_bit_equal(
    runs: Runs, undisturbed: list[dict[str, Any]], ranks: list[int], asynchronous: bool
) -> None:
    name = f"told-{len(ranks)}-{asynchronous}"
    options = OPTIONS | {"asynchronous": asynchronous}
    # The signal comes in the third step, while an asynchronous save still writes the second step's checkpoint.
    assert runs.endings(name, 2, send={"step": 2, "ranks": ranks}, **options) == [(STOPPED, 3)] * 2
    assert _trained(runs.metrics(name)) == undisturbed[:3]
    assert runs.endings(name, 2, **options) == [(0, STEPS)] * 2
    assert _trained(runs.metrics(name)) == undisturbed


def test_sigterm_before_the_first_step_ends_at_once(runs: Runs) -> None:
    with pytest.raises(RuntimeError, match="died"):
        runs.endings("early", 2, send={"step": -1, "ranks": [0, 1]}, **OPTIONS)
    assert not list((runs.folder / "early").glob("checkpoints/*/weights"))


def test_sigterm_in_the_last_step_leaves_a_finished_training(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    options = OPTIONS | {"every": 4}
    assert runs.endings("late", 2, send={"step": STEPS - 1, "ranks": [0]}, **options) == [(STOPPED, STEPS)] * 2
    assert _trained(runs.metrics("late")) == undisturbed


def test_a_nan_loss_ends_all_ranks_unsaved(runs: Runs) -> None:
    options = {"steps": STEPS, "every": 2, "resilient": True, "asynchronous": True}
    (first, kept), second = runs.endings("poisoned", 2, poison={"step": 3}, **options)
    assert (first, kept) == second
    assert "Loss of step 4 is nan; expected a finite number. The last good checkpoint is" in first
    assert "step=1-last. Start again to resume from it; " in first
    assert "train in a new folder with a lower optim.config.lr" in first
    assert kept == 2
    assert [line["step"] for line in runs.metrics("poisoned")] == [1, 2, 3]


@pytest.mark.weekly
def test_ft_launcher_restarts_a_hung_rank_bit_equal(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    """The second rank sleeps forever in the fourth step, after the checkpoint of the second step was saved."""
    folder, once = runs.folder / "hung", runs.folder / "hung-once"
    options = OPTIONS | {"hang": {"step": 3, "once": str(once)}}
    process = under_ft_launcher(RANK, runs.parent, runs.data, folder, json.dumps(options))
    _, said = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, said[-3000:]
    assert once.exists()
    assert "step 3/6" in said
    assert said.count("training data: blend tiny") >= 2  # started again
    assert _trained(runs.metrics("hung")) == undisturbed
    assert training_result(folder)["tensors"] == training_result(runs.folder / "undisturbed")["tensors"]


def test_sigterm_to_ft_launcher_saves(runs: Runs, undisturbed: list[dict[str, Any]]) -> None:
    folder = runs.folder / "launcher-told"
    options = OPTIONS | {"steps": 500, "every": 1000}
    process = under_ft_launcher(RANK, runs.parent, runs.data, folder, json.dumps(options))
    assert process.stderr
    said = []
    for line in process.stderr:
        said.append(line)
        if "step 2/500" in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_S) == 1  # the launcher's own status, whatever the status of its ranks is
    words = "".join(said)
    kept = step_kept(folder)
    assert kept >= 2
    assert f"Stopped by SIGTERM after step {kept} of 500" in words


@pytest.mark.parametrize(("ranks", "asynchronous"), quick(TRAININGS, (2, True)))
def test_killed_training_resumes_and_ends_bit_equal(tmp_path: Path, ranks: int, asynchronous: bool) -> None:
    """The short form of the soak in `make weekly`: four kills, half of them aimed."""
    seen = soak_training(tmp_path, 4, ranks=ranks, asynchronous=asynchronous)
    assert sum(seen.values()) == 4
