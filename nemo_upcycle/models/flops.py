"""The FLOPs of training a model: one formula for the planner, the metrics of a run, and the reports."""

from __future__ import annotations

from nemo_upcycle.models.architecture import Architecture


def flops_per_token(arch: Architecture, seq_length: int, *, causal: bool) -> float:
    """Return the FLOPs of training on one token: forward and backward, without recomputation.

        6 (active parameters - input embedding) + attention, where attention is 12 L H K s over the whole square of
        scores (`causal=False`: as arXiv 2412.09952, Table 1, and Megatron-Core to 0.10 count) or 6 L H K s over
        its lower half (`causal=True`: as Megatron-Bridge counts).

    The output layer counts, tied or not; norms and biases are counted with the parameters. L are the layers that
    have an attention; the scan of Mamba layers is not counted.

    Args:
        arch: the model's architecture.
        seq_length: s, tokens in a sequence.
        causal: which of the two conventions.

    Example:
        Llama 3 8B, s = 8192, full: 4.744e14 FLOPs a sequence; its E8T2 7.515e14 (the paper: 4.7e14 and 7.5e14).
    """
    embeddings = 0 if arch.tied_embeddings else arch.embedding_params
    scores = (6 if causal else 12) * len(arch.layers_with("*")) * arch.num_heads * arch.head_dim * seq_length
    return 6.0 * (arch.active_params - embeddings) + scores
