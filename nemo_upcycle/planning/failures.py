"""How failures lengthen a training, and how often it should save.

Failures are assumed to come at random, with a mean time M between two of them. A training does t seconds of steps
between two saves, a save stops it for d seconds, and a failure costs R seconds besides the lost work. Then one second
of steps takes M exp(R / M) (exp((t + d) / M) - 1) / t seconds on average. This is shortest near t = sqrt(2 d M) - d
(J. T. Daly, Future Generation Computer Systems 22 (2006) 303-312).

An asynchronous save does not stop the training. The work during the save is lost if a failure comes before its end.
"""

from __future__ import annotations

import math


#: GPU-hours between two failures: the training of Llama 3 had 419 unexpected interruptions in 54 days on 16,384 H100s
#: (arXiv 2407.21783, section 3.3.4).
USUAL_GPU_HOURS = 54 * 24 * 16_384 / 419


def goodput(interval_s: float, save_s: float, restart_s: float, between_failures_s: float, *, is_async: bool) -> float:
    """Return the share of a training's time that it spends on steps which are kept.

    Args:
        interval_s: time of the steps between two saves (seconds).
        save_s: time of a save (seconds).
        restart_s: time from a failure to the next step (seconds).
        between_failures_s: mean time between two failures of the whole job (seconds).
        is_async: whether training goes on during a save.

    Example:
        >>> round(goodput(1950, 310, 600, 99 * 3600, is_async=True), 4)
        0.9947
    """
    stopped_s, lost_s = (0.0, restart_s + save_s) if is_async else (save_s, restart_s)
    lost, cycle = lost_s / between_failures_s, (interval_s + stopped_s) / between_failures_s
    if max(lost, cycle) > 500:  # the exponential would overflow
        return 0.0
    return interval_s / between_failures_s / (math.exp(lost) * math.expm1(cycle))


def best_interval_s(save_s: float, between_failures_s: float, *, is_async: bool) -> float:
    """Return the time between two saves with the highest goodput (seconds).

    Asynchronous saves cost no time, so only the file system limits them. This function lets them write for half of the
    time.

    Args:
        save_s: time of a save (seconds).
        between_failures_s: mean time between two failures (seconds).
        is_async: whether training goes on during a save.
    """
    if is_async:
        return 2 * save_s
    best_s = math.sqrt(2 * save_s * between_failures_s) - save_s
    return best_s if save_s < between_failures_s / 2 else between_failures_s
