"""The FLOPs of training a model: the planner, the metrics of a run and the reports use the same formula."""

from __future__ import annotations

from collections import Counter

from nemo_upcycle.models.architecture import Architecture


def mean_context(seq_length: int, window: int | None = None) -> float:
    """Return how many tokens a token attends to on average, itself included, under a causal mask.

    Args:
        seq_length: s, tokens in a sequence.
        window: number of tokens that attention sees; None for all.
    """
    seen = min(window or seq_length, seq_length)
    return seen - seen**2 / (2 * seq_length)


def flops_per_token(arch: Architecture, seq_length: int, *, causal: bool) -> float:
    """Return the FLOPs of training on one token: forward and backward, without recomputation.

        6 (active parameters - input embedding) + attention

    With `causal=False`, attention is 12 L H K s, for the whole square of scores, as in arXiv 2412.09952 (Table 1) and
    Megatron-Core up to 0.10. With `causal=True`, attention is 6 L H K s, for the lower half of the square, as in
    Megatron-Bridge.

    If a window hides tokens, s is the number of tokens that remain visible. The output layer counts even if it is
    tied. Norms and biases count as parameters. L is the number of layers with attention. In Mamba layers and gated
    delta nets, the work between the projections does not count.

    Args:
        arch: architecture of the model.
        seq_length: s, tokens in a sequence.
        causal: whether to count only the lower half of the scores.

    Example:
        With s = 8192 and `causal=False`, Llama 3 8B needs 4.744e14 FLOPs per sequence, and its E8T2 model needs
        7.515e14. The paper prints 4.7e14 and 7.5e14.
    """
    params = arch.active_params - (0 if arch.tied_embeddings else arch.embedding_params)
    windows = [arch.window_of(layer) for layer in arch.layers_with("*")]
    seen = sum(count * mean_context(seq_length, window) for window, count in Counter(windows).items())
    return 6.0 * params + (6 if causal else 12) * seen * 2 * arch.num_heads * arch.head_dim
