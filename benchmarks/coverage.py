"""How often does a grid's 95 % interval hold the true difference?

    python -m benchmarks.coverage          the table of benchmarks/results/coverage.md, about four minutes
    python -m benchmarks.coverage --trials 20

Grids are drawn with a known difference: documents that differ in how much they gain, trainings that differ from seed
to seed by 1 to 6 times what the documents leave uncertain. An arm with 1, 2, 3 or 5 seeds stands alone beside its
reference, or beside six other arms of three seeds: of the same spread, as it is taken to be, or of half of it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import numpy as np

from nemo_upcycle.evaluation.arms import difference_of_arms, judge, pooled_spread
from nemo_upcycle.evaluation.heldout import Sums


DOCUMENTS, BYTES = 32, 4000
SEEDS, SPREADS = (1, 2, 3, 5), (1, 2, 3, 4, 5, 6)
#: Other arms, their seeds, and their spread in the spread of the arm and its reference.
OTHERS = {
    "its reference alone": (0, 1.0),
    "6 arms of 3 seeds": (6, 1.0),
    "6 arms of 3 seeds, half the spread": (6, 0.5),
}
THEIR_SEEDS = 3
DIFFERENCE = 0.01
#: Standard error over documents of a difference.
DOCUMENT_ERROR = 4e-4


def draw_grid(
    random: np.random.Generator, seeds: int, spread: float, others: int, theirs: float
) -> dict[str, dict[int, Sums]]:
    """Draw the scores of `arm`, `reference` and others: name -> seed -> sums of documents.

    Args:
        random: source of numbers.
        seeds: number of seeds that the arm and its reference were trained with.
        spread: standard deviation of an arm from seed to seed, in bits per byte.
        others: how many further arms, of `THEIR_SEEDS` seeds.
        theirs: their spread, in the arm's.
    """
    all_seeds = range(1, max(seeds, THEIR_SEEDS) + 1)
    common = {seed: random.normal(0, 2 * spread) for seed in all_seeds}
    level = random.normal(2, 0.3, DOCUMENTS)
    grid = {}
    for number in range(2 + others):
        name = ("arm", "reference")[number] if number < 2 else f"other {number}"
        own = spread if number < 2 else theirs * spread
        gains = random.normal(
            DIFFERENCE if name == "arm" else 0.0, DOCUMENT_ERROR * math.sqrt(DOCUMENTS / 2), DOCUMENTS
        )
        grid[name] = {
            seed: {
                f"document {place}": (-bits * BYTES * math.log(2), float(BYTES))
                for place, bits in enumerate(level + gains + common[seed] + random.normal(0, own))
            }
            for seed in all_seeds[: seeds if number < 2 else THEIR_SEEDS]
        }
    return grid


def covered(random: np.random.Generator, seeds: int, times: int, others: int, theirs: float) -> bool | None:
    """Draw a grid; say whether the interval holds the difference, None where there is no interval."""
    grid = draw_grid(random, seeds, times * DOCUMENT_ERROR, others, theirs)
    found = judge(difference_of_arms(grid["arm"], grid["reference"]), pooled_spread([grid]))
    return None if found["low"] is None else bool(found["low"] <= DIFFERENCE <= found["high"])


def rows(trials: int) -> Iterator[str]:
    """Yield the lines of the table."""
    yield f"| seeds | beside | {' | '.join(f'spread {times}' for times in SPREADS)} |"
    yield f"|---:|---|{'---:|' * len(SPREADS)}"
    for beside, (others, theirs) in OTHERS.items():
        for seeds in SEEDS:
            cells = []
            for times in SPREADS:
                random = np.random.default_rng([seeds, times, others, round(10 * theirs)])
                answers = [covered(random, seeds, times, others, theirs) for _ in range(trials)]
                known = [answer for answer in answers if answer is not None]
                cells.append(f"{100 * sum(known) / len(known):.1f} %" if known else "not to be had")
            yield f"| {seeds} | {beside} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="grids of each cell (%(default)s)")
    for row in rows(parser.parse_args().trials):
        print(row, flush=True)


if __name__ == "__main__":
    main()
