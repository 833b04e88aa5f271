"""Samples that a training skips. The samples after them move up, so that step numbers and the number of steps stay."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SkippedSamples:
    """Ranges of samples that a training leaves out of its data's order.

    Args:
        ranges: pairs of the first sample of a range and the first sample after it, in the data's order. The ranges are
            sorted and do not touch each other.

    Example:
        >>> skipped = SkippedSamples.of([(10, 12)])
        >>> [skipped.sample_at(place) for place in range(9, 12)]
        [9, 12, 13]
        >>> skipped.place_of(12), skipped.place_of(11)
        (10, None)
    """

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[Iterable[int]]) -> SkippedSamples:
        """Return sorted ranges; ranges that overlap or touch become one range."""
        joined: list[tuple[int, int]] = []
        for start, end in sorted((start, end) for start, end in ranges if start < end):
            if joined and start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
            else:
                joined.append((start, end))
        return cls(tuple(joined))

    @property
    def count(self) -> int:
        """Number of skipped samples."""
        return sum(end - start for start, end in self.ranges)

    def sample_at(self, place: int) -> int:
        """Return the sample that the training reads at a place, both counted from 0."""
        for start, end in self.ranges:
            if place < start:
                break
            place += end - start
        return place

    def place_of(self, sample: int) -> int | None:
        """Return the place at which the training reads a sample; None if the sample is skipped."""
        before = 0
        for start, end in self.ranges:
            if sample < start:
                break
            if sample < end:
                return None
            before += end - start
        return sample - before

    def without_places(self, first: int, after: int) -> SkippedSamples:
        """Return these ranges together with the samples that the training reads at some places.

        Args:
            first: first place.
            after: first place after the last one.
        """
        samples = map(self.sample_at, range(first, after))
        return self.of([*self.ranges, *((sample, sample + 1) for sample in samples)])

    def left_in(self, dataset: Any) -> Any:
        """Return a dataset without the skipped samples; the dataset itself if none is skipped."""
        return _WithoutSkipped(dataset, self) if self.ranges else dataset


class _WithoutSkipped:
    """A dataset without the skipped samples."""

    def __init__(self, dataset: Any, skipped: SkippedSamples) -> None:
        self._dataset, self._skipped = dataset, skipped
        if hasattr(dataset, "collate_fn"):
            self.collate_fn = dataset.collate_fn

    def __len__(self) -> int:
        return len(self._dataset) - self._skipped.count

    def __getitem__(self, place: int) -> Any:
        return self._dataset[self._skipped.sample_at(place)]
