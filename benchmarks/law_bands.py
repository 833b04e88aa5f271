"""How often the law's 90 % bands hold the true difference, on points of known laws.

    python -m benchmarks.law_bands            the table
    python -m benchmarks.law_bands --trials 3 --workers 1

Each truth makes grids of four parents, three numbers of tokens and three seeds; the law is fitted to each, and asked
inside the range and beyond it. The noise is a choice. No form is right for the truths of `NO_FORM`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from benchmarks.law_fit import Point, fit_law


PARENTS, TOKENS, SEEDS = (2.5e6, 5e6, 1e7, 2e7), (1.25e6, 2.5e6, 5e6), (1, 2, 3)
#: Standard deviation of a training, and the part of it that dense and upcycled training of one seed share.
NOISE, SHARED = 0.004, 0.7
PARAMETERS = 850_000
OPTIONS = ("dense", "upcycled_e8t2")
Loss = Callable[[float, float], float]


def dense_sum(parent: float, tokens: float) -> float:
    """Return the loss of a parent trained on as one training on all tokens."""
    return 40 * (parent + tokens) ** -0.22 + 1.5


def dense_restart(parent: float, tokens: float) -> float:
    """Return the same, with a loss from starting again that new tokens make good."""
    return dense_sum(parent, tokens) + 0.05 * (tokens / parent) ** -0.3 * (tokens / 1e6) ** -0.2


#: Name of a truth -> losses of the parent trained on, and of the upcycled model.
TRUTHS: dict[str, tuple[Loss, Loss]] = {
    "interaction": (dense_sum, lambda d1, d2: 300 * d1**-0.28 * d2 ** (-0.24 + 0.012 * math.log(d1)) + 1.4),
    "additive": (dense_sum, lambda d1, d2: 30 * d1**-0.2 + 10 * d2**-0.25 + 1.4),
    "sum": (dense_sum, lambda d1, d2: 44 * (d2 + 0.6 * d1) ** -0.225 + 1.46),
    "logarithms": (
        dense_sum,
        lambda d1, d2: dense_sum(d1, d2) + 0.02 * math.log(d1 / 7e6) - 0.01 * math.log(d2 / 2e6),
    ),
    "equal": (dense_sum, dense_sum),
}
NO_FORM: dict[str, tuple[Loss, Loss]] = {
    "gain of the ratio, saturating": (
        dense_sum,
        lambda d1, d2: dense_sum(d1, d2) - 0.12 * (d2 / d1) ** 0.5 / (1 + (d2 / d1) ** 0.5),
    ),
    "gain that fades exponentially": (dense_sum, lambda d1, d2: dense_sum(d1, d2) - 0.1 * math.exp(-d1 / 1.5e7)),
    "restart, gain a power": (
        dense_restart,
        lambda d1, d2: dense_restart(d1, d2) - 0.06 * (d1 / 5e6) ** -0.6 * (d2 / 2e6) ** 0.35,
    ),
    "two powers that cross": (dense_restart, lambda d1, d2: 70 * (d2 + 0.3 * d1) ** -0.27 + 12 * d1**-0.3 + 1.55),
    "gain with a peak": (
        dense_sum,
        lambda d1, d2: dense_sum(d1, d2) - 0.06 * math.exp(-((math.log(d2 / 4e6)) ** 2) / 4) * (d1 / 5e6) ** -0.3,
    ),
}
#: Where a law is asked: how many times beyond the range, and the factors on the largest parent and tokens.
PLACES: dict[str, tuple[tuple[float, float], ...]] = {
    "inside": ((0.25, 0.5), (0.5, 0.5), (0.75, 0.75), (0.35, 0.9)),
    "1.5": ((1.5, 1.0), (1.0, 1.5), (1.5, 1.5)),
    "2": ((2.0, 1.0), (1.0, 2.0), (2.0, 2.0)),
    "4": ((4.0, 1.0), (1.0, 4.0), (4.0, 4.0)),
}


def points_of(truth: str, trial: int) -> list[Point]:
    """Return the trainings of one grid of a truth."""
    random = np.random.default_rng([trial, sum(map(ord, truth))])
    points = []
    for parent in PARENTS:
        luck = NOISE / 2 * random.normal()  # of the parent, which all that follows it inherits
        for tokens in TOKENS:
            for seed in SEEDS:
                shared, *own = random.normal(size=3)
                for option, loss, noise in zip(OPTIONS, (TRUTHS | NO_FORM)[truth], own, strict=True):
                    value = loss(parent, tokens) + luck
                    value += NOISE * (SHARED**0.5 * shared + (1 - SHARED) ** 0.5 * noise)
                    points.append(Point(option, parent, tokens, PARAMETERS, seed, value))
    return points


def asked(job: tuple[str, int, int]) -> list[tuple[str, str, bool, bool, bool, float]]:
    """Return of a truth's trial, for each place: whether the band holds the truth, is resolved, and has its sign."""
    truth, trial, draws = job
    dense, upcycled = (TRUTHS | NO_FORM)[truth]
    law, answers = fit_law(points_of(truth, trial), truth, "synthetic", draws), []
    for place, factors in PLACES.items():
        for of_parent, of_tokens in factors:
            parent, tokens = of_parent * PARENTS[-1], of_tokens * TOKENS[-1]
            band = law.difference("upcycled_e8t2", tokens, "dense", tokens, parent)
            true = upcycled(parent, tokens) - dense(parent, tokens)
            assert band.low is not None
            assert band.high is not None
            holds, right = band.low <= true <= band.high, (band.value > 0) == (true > 0)
            answers.append((truth, place, holds, band.is_resolved, right, band.high - band.low))
    return answers


def main() -> None:
    """Ask, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10, help="grids of each truth (default: 10)")
    parser.add_argument("--draws", type=int, default=50, help="of the bootstrap (default: 50)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    args = parser.parse_args()
    jobs = [(truth, trial, args.draws) for trial in range(args.trials) for truth in TRUTHS | NO_FORM]
    if args.workers > 1:
        with ProcessPoolExecutor(args.workers) as pool:
            answers = [one for found in pool.map(asked, jobs) for one in found]
    else:
        answers = [one for job in jobs for one in asked(job)]
    print(table(answers))


def table(answers: list[tuple[str, str, bool, bool, bool, float]]) -> str:
    """Return, of each truth and place, the share of bands that hold it, the wrong signs, and the median width."""
    lines = ["| truth | " + " | ".join(PLACES) + " |", "|---|" + "---:|" * len(PLACES)]
    groups = {name: [name] for name in TRUTHS | NO_FORM}
    groups |= {"a form is right": list(TRUTHS), "no form is right": list(NO_FORM)}
    for name, members in groups.items():
        cells = []
        for place in PLACES:
            here = [one for one in answers if one[0] in members and one[1] == place]
            resolved = [one for one in here if one[3]]
            wrong = sum(not one[4] for one in resolved)
            width = float(np.median([one[5] for one in here]))
            share = 100 * sum(one[2] for one in here) / len(here)
            cells.append(f"{share:.0f} % ({wrong} of {len(resolved)} wrong, {width:.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
