"""The training of arXiv 2412.09952 in numbers, for the recipes of both trainers.

The paper states 100B tokens, the learning rates, a cosine schedule between them, and the warm-up. It does not state
the number of steps, so the batch size here is NeMo's for Llama 3, which He et al. (arXiv 2410.07524) found best.
"""

from __future__ import annotations


#: Peak and final learning rate, and the number of steps until the peak.
PEAK, END, WARMUP_STEPS = 3e-5, 3e-7, 100
TOKENS_A_STEP = 512 * 8192
STEPS = 23_842
#: Steps between two checkpoints: about half an hour for Llama 3 8B E8T2 on 512 H100 (derived).
CHECKPOINT_STEPS = 1000
#: Steps between two checkpoints that are kept for good, so that a run can be rewound to before a slow decline.
KEEP_EVERY = 10_000
#: Higher peaks are for random weights, or for hundreds of billions of tokens (docs/schedules.md).
HIGH = 1e-4


def high_rate(peak: float | None) -> str:
    """Return a warning about a learning rate that trained weights may not survive; "" for any other rate.

    Args:
        peak: peak of the learning rate; None if it is not known.

    Example:
        >>> high_rate(3e-5)
        ''
    """
    if peak is None or peak <= HIGH:
        return ""
    return (
        f"the learning rate rises to {peak:g}: above {HIGH:g}, training soon destroys the parent's weights,"
        f" unless very many tokens follow; the paper's peak is {PEAK:g}"
    )
