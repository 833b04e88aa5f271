"""The training of arXiv 2412.09952 in numbers, for the recipes of both trainers.

The paper states 100B tokens, the learning rates, a cosine between them and the warm-up, but no steps: batches are
NeMo's for Llama 3, which He et al. (arXiv 2410.07524) found best.
"""

from __future__ import annotations


#: Learning rates, and the steps until the first is reached.
PEAK, END, WARMUP_STEPS = 3e-5, 3e-7, 100
TOKENS_A_STEP = 512 * 8192
STEPS = 23_842
#: Steps between two checkpoints: about half an hour of Llama 3 8B E8T2 on 512 H100 (derived).
CHECKPOINT_STEPS = 1000
#: Peaks above this one are for random weights, or for hundreds of billions of tokens (docs/schedules.md).
HIGH = 1e-4


def high_rate(peak: float | None) -> str:
    """Warn of a learning rate that trained weights may not survive; "" for any other.

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
