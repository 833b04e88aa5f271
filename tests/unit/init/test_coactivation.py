"""Neurons that are active together come into one part; all parts have one size."""

from __future__ import annotations

import pytest
import torch

from nemo_upcycle.init.coactivation import split_by_coactivation


NEURONS, TOKENS = 48, 256


def _planted(parts: int, seed: int = 5) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return which neurons are active, and the group of each: a token has most of one group's, and some others'."""
    generator = torch.Generator().manual_seed(seed)
    group_F = torch.randperm(NEURONS, generator=generator) % parts
    topic_T = torch.randint(parts, (TOKENS,), generator=generator)
    chance_TF = torch.where(group_F == topic_T[:, None], 0.6, 0.05)
    marks_TF = torch.rand(TOKENS, NEURONS, generator=generator) < chance_TF
    return list(marks_TF.split(64)), group_F


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("seed", range(4))
def test_planted_groups_are_found(parts: int, seed: int) -> None:
    marks, group_F = _planted(parts, seed)
    split = split_by_coactivation(marks, parts, map)
    found = {tuple(part.tolist()) for part in split.neurons.split(NEURONS // parts)}
    assert found == {tuple((group_F == group).nonzero()[:, 0].tolist()) for group in range(parts)}
    assert split.within > split.within_consecutive


def test_parts_have_one_size_where_the_groups_have_not() -> None:
    marks_TF = torch.zeros(20, NEURONS, dtype=torch.bool)
    marks_TF[:10, :40] = True
    marks_TF[10:, 40:] = True
    split = split_by_coactivation([marks_TF], 4, map)
    assert sorted(split.neurons.tolist()) == list(range(NEURONS))
    last = [part for part in split.neurons.split(12) if set(range(40, 48)) <= set(part.tolist())]
    assert len(last) == 1


def test_neurons_that_no_token_activates_are_somewhere() -> None:
    marks, _ = _planted(4)
    for batch in marks:
        batch[:, :30] = False
    split = split_by_coactivation(marks, 4, map)
    assert sorted(split.neurons.tolist()) == list(range(NEURONS))


def test_the_order_of_the_batches_does_not_matter() -> None:
    marks, _ = _planted(4)
    assert torch.equal(
        split_by_coactivation(marks, 4, map).neurons, split_by_coactivation(marks[::-1], 4, map).neurons
    )


def test_neurons_ascend_in_a_part_and_shares_are_of_pairs() -> None:
    marks = [torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0]]).bool()]
    split = split_by_coactivation(marks, 2, map)
    assert split.neurons.tolist() == [0, 2, 1, 3]
    # Of the three pairs of active neurons two are in {0, 2} and {1, 3}, one is in {0, 1} and {2, 3}.
    assert (split.within, split.within_consecutive) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
