"""The FLOPs of training a model: one formula for the planner, the metrics of a run, and the reports."""

from __future__ import annotations

from collections import Counter

from nemo_upcycle.models.architecture import Architecture


def mean_context(seq_length: int, window: int | None = None) -> float:
    """Return how many tokens a token of a sequence attends to in the mean, itself included, under a causal mask.

    Args:
        seq_length: s, tokens in a sequence.
        window: tokens that attention sees; None for all.
    """
    seen = min(window or seq_length, seq_length)
    return seen - seen**2 / (2 * seq_length)


def flops_per_token(arch: Architecture, seq_length: int, *, causal: bool) -> float:
    """Return the FLOPs of training on one token: forward and backward, without recomputation.

        6 (active parameters - input embedding) + attention, where attention is 12 L H K s over the whole square of
        scores (`causal=False`: as arXiv 2412.09952, Table 1, and Megatron-Core to 0.10 count) or 6 L H K s over
        its lower half (`causal=True`: as Megatron-Bridge counts).

    Where a window hides tokens, s is what is left of it. The output layer counts, tied or not; norms and biases are
    counted with the parameters. L are the layers that have an attention; what Mamba layers and gated delta nets do
    between their projections is not counted.

    Args:
        arch: the model's architecture.
        seq_length: s, tokens in a sequence.
        causal: which of the two conventions.

    Example:
        Llama 3 8B, s = 8192, full: 4.744e14 FLOPs a sequence; its E8T2 7.515e14 (the paper: 4.7e14 and 7.5e14).
    """
    params = arch.active_params - (0 if arch.tied_embeddings else arch.embedding_params)
    windows = [arch.window_of(layer) for layer in arch.layers_with("*")]
    seen = sum(count * mean_context(seq_length, window) for window, count in Counter(windows).items())
    return 6.0 * params + (6 if causal else 12) * seen * 2 * arch.num_heads * arch.head_dim
