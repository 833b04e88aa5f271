"""The goodput formula agrees with simulated failures, and no interval has a higher goodput than the best one."""

from __future__ import annotations

import random

import pytest

from nemo_upcycle.planning.failures import USUAL_GPU_HOURS, best_interval_s, goodput


HOUR_S = 3600.0


def _simulated(interval_s: float, save_s: float, restart_s: float, between_s: float, *, is_async: bool) -> float:
    """Return the goodput of 20,000 saves with random failures."""
    draw, saves, spent_s = random.Random(0), 20_000, 0.0
    lost_s = restart_s + save_s * is_async
    for _ in range(saves):
        left_s = interval_s + save_s * (not is_async)
        while (failure_s := draw.expovariate(1 / between_s)) < left_s:
            spent_s += failure_s
            while (failure_s := draw.expovariate(1 / between_s)) < lost_s:  # a failure during the restart
                spent_s += failure_s
            spent_s += lost_s
        spent_s += left_s
    return saves * interval_s / spent_s


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("between_s", [2 * HOUR_S, 20 * HOUR_S])
def test_goodput_is_that_of_simulated_failures(between_s: float, is_async: bool) -> None:
    found = goodput(3000, 300, 600, between_s, is_async=is_async)
    assert found == pytest.approx(_simulated(3000, 300, 600, between_s, is_async=is_async), rel=0.01)


def test_no_interval_is_better_than_the_best() -> None:
    best_s = best_interval_s(300, 10 * HOUR_S, is_async=False)
    highest = max(goodput(seconds, 300, 600, 10 * HOUR_S, is_async=False) for seconds in range(100, 20_000, 10))
    assert goodput(best_s, 300, 600, 10 * HOUR_S, is_async=False) == pytest.approx(highest, rel=1e-4)


def test_saves_longer_than_the_time_between_failures_keep_no_step() -> None:
    assert goodput(10.0, 1e6, 0.0, 1.0, is_async=False) == 0.0


def test_llama_3s_training_was_interrupted_every_three_hours() -> None:
    assert pytest.approx(3.1, abs=0.05) == USUAL_GPU_HOURS / 16_384
