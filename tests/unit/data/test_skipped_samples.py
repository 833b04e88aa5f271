"""Samples that a training leaves out."""

from __future__ import annotations

from nemo_upcycle.data.skipped_samples import SkippedSamples


def test_places_and_samples_are_each_others_inverse() -> None:
    skipped = SkippedSamples.of([(12, 15), (3, 5), (5, 6), (7, 7)])
    assert skipped.ranges == ((3, 6), (12, 15))
    left = [sample for sample in range(30) if sample not in {3, 4, 5, 12, 13, 14}]
    assert [skipped.sample_at(place) for place in range(len(left))] == left
    assert [skipped.place_of(sample) for sample in left] == list(range(len(left)))
    assert {skipped.place_of(sample) for sample in (3, 4, 5, 12, 13, 14)} == {None}


def test_a_second_rewind_skips_samples_of_the_first_branch() -> None:
    first = SkippedSamples.of([(3, 6)])
    assert first.without_places(2, 5).ranges == ((2, 8),)
    assert [*map(first.without_places(2, 5).sample_at, range(4))] == [0, 1, 8, 9]


def test_a_dataset_is_left_alone_if_nothing_is_skipped() -> None:
    samples = list(range(10))
    assert SkippedSamples().left_in(samples) is samples
    left = SkippedSamples.of([(0, 2), (9, 10)]).left_in(samples)
    assert [left[place] for place in range(len(left))] == [2, 3, 4, 5, 6, 7, 8]
