"""Which losses count as spikes."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from nemo_upcycle.trainers.loss_spikes import LEAST, LossSpikes


def test_a_spike_is_written_and_does_not_move_the_window(tmp_path: Path) -> None:
    spikes, metrics = LossSpikes(), tmp_path / "metrics.jsonl"
    for step in range(LEAST):
        assert spikes.limit() is None
        assert spikes.add(step, 2.0 + 0.01 * (step % 3), tmp_path) is None
    limit = spikes.limit()
    assert limit == pytest.approx(2.01 + 8 * 0.0201)  # the spread is at least 1 % of the median
    assert spikes.add(21, limit - 0.001, tmp_path) is None
    assert not metrics.exists()
    assert spikes.add(22, 9.0, tmp_path) == pytest.approx(limit, rel=1e-2)
    assert json.loads(metrics.read_text()) == {"step": 22, "loss_spike": 9.0, "limit": pytest.approx(limit, rel=1e-2)}
    assert spikes.limit() == pytest.approx(limit, rel=1e-2)


def test_losses_that_scatter_widen_the_limit_by_their_standard_deviation(tmp_path: Path) -> None:
    """In a normal distribution, the median distance from the median is the standard deviation divided by 1.4826."""
    spikes, losses = LossSpikes(window=255), statistics.NormalDist(2.0, 0.1).quantiles(256)
    random.Random(1).shuffle(losses)
    for step, loss in enumerate(losses):
        spikes.add(step, loss, tmp_path)
    assert spikes.limit() == pytest.approx(2.0 + 8 * 0.1, rel=0.005)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_stays_higher_is_normal_after_a_while(tmp_path: Path) -> None:
    spikes = LossSpikes(window=40)
    for step in range(40):
        spikes.add(step, 2.0, tmp_path)
    found = [spikes.add(step, 2.3, tmp_path) for step in range(40, 100)]
    assert found[0] is not None
    assert found[-1] is None
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == sum(one is not None for one in found)


def test_another_rank_writes_nothing() -> None:
    spikes = LossSpikes()
    for step in range(LEAST):
        spikes.add(step, 2.0, None)
    assert spikes.add(LEAST, 2.5, None) == pytest.approx(2.16)
