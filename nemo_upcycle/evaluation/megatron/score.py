"""Log-likelihoods of token sequences from a Megatron model of any layout, whether built here or in training.

All ranks of the job call together with the same sequences. Each replica takes its part of them; what the last pipeline
stage finds is given to all. Logits are never gathered: each rank reduces its part of the vocabulary to the largest
logit and the sum of exponentials of a position, and the logit of a token. Sequences that differ in their last token
alone, as the answers A to D do, go through the model once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.megatron.forward import evaluating, forward, padded_length
from nemo_upcycle.evaluation.megatron.passes import Pass, Scored, batches_of, rows_of


_Answer = tuple[list[float], bool]
#: Passes in a row of a pipeline, as a multiple of its stages: 4 keep three quarters of them busy and more.
_PASSES_PER_STAGE = 4


def score(
    chunks: Sequence[Any],
    sequences: Sequence[Scored],
    *,
    vocab_size: int,
    batch_size: int | str = "auto",
    progress: Callable[[int], None] | None = None,
) -> list[_Answer]:
    """Return the log-likelihood of every predicted token of every sequence, the same on all ranks.

    Args:
        chunks: this rank's, from `build_chunks` or of a training job, wrapped or not.
        sequences: token ids and how many of the last are predicted; the same list on every rank.
        vocab_size: V without padding: rows that only pad the embedding are no tokens.
        batch_size: sequences in one pass, or `auto`: `AUTO_TOKENS` of `passes.py`.
        progress: called after some passes with the number of sequences that are done.

    Returns:
        For each sequence the log-likelihoods in nats, and whether each predicted token is the likeliest.

    Raises:
        UpcycleError: the model gives NaN or infinity, or a token is beyond its vocabulary.

    Example:
        >>> score(chunks, [([1, 523, 12, 7], 2)], vocab_size=32000)  # doctest: +SKIP
        [([-3.2, -0.4], False)]
    """
    from megatron.core import parallel_state

    _check_tokens(sequences, vocab_size)
    replicas, mine = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    rows = list(rows_of(sequences).items())
    batches = list(batches_of([len(inputs) for inputs, _ in rows], batch_size))
    in_a_row = 1 if stages == 1 else _PASSES_PER_STAGE * stages
    found: dict[int, _Answer] = {}
    with evaluating(chunks):
        for start in range(0, len(batches), in_a_row * replicas):
            together = [[rows[row] for row in batch] for batch in batches[start : start + in_a_row * replicas]]
            # Every replica makes as many passes: the ranks that share experts wait for each other in each of them. An
            # interleaved schedule takes whole groups of them. Batches of similar length run at the same time.
            count = _rounded(len(together), replicas, _unit(chunks))
            passes = [together[number] if number < len(together) else [] for number in range(mine, count, replicas)]
            size = max(map(len, together))
            length = padded_length(max(len(inputs) for batch in together for inputs, _ in batch), chunks[0])
            found |= _run(chunks, [Pass(sequences, batch, size, length) for batch in passes], vocab_size)
            if progress:
                progress(sum(len(numbers) for batch in together for _, numbers in batch))
    found = _gathered(found)
    _check_finite(found)
    return [found[number] for number in range(len(sequences))]


def _check_finite(found: dict[int, _Answer]) -> None:
    wrong = [number for number, (likelihoods, _) in found.items() if not all(map(math.isfinite, likelihoods))]
    if wrong:
        raise UpcycleError(
            f"log-likelihoods of {len(wrong)} of {len(found)} texts",
            got="NaN or infinity",
            expected="numbers",
            fix="a diverged run has no score: nemo-upcycle export names the tensor with NaN, if weights have it",
        )


def _unit(chunks: Sequence[Any]) -> int:
    """Return the number of passes that an interleaved schedule takes multiples of."""
    return int(chunks[0].config.microbatch_group_size_per_vp_stage) if len(chunks) > 1 else 1


def _rounded(batches: int, replicas: int, multiple: int) -> int:
    """Return a number of batches, at least as many, that gives every replica the same multiple of passes."""
    unit = replicas * multiple
    return -(-batches // unit) * unit


def _check_tokens(sequences: Sequence[Scored], vocab_size: int) -> None:
    highest = max((max(tokens) for tokens, _ in sequences), default=0)
    if highest >= vocab_size:
        raise UpcycleError(
            "token of the texts",
            got=highest,
            expected=f"below the model's vocabulary of {vocab_size}",
            fix="use the tokenizer that the model was trained with",
        )


def _run(chunks: Sequence[Any], passes: Sequence[Pass], vocab_size: int) -> dict[int, _Answer]:
    """Run this replica's passes through the pipeline; return answers by sequence number, on the last stage alone."""
    config = chunks[0].config
    asked_only = not config.sequence_parallel and config.context_parallel_size == 1
    outputs = forward(
        chunks,
        [one.tokens_NS for one in passes],
        lambda logits, number: passes[number].answers(logits, vocab_size, asked_only=asked_only),
        positions=[(one.rows_P, one.places_P) for one in passes] if asked_only else None,
    )
    found = {}
    for one, output_2Q in zip(passes, outputs, strict=False):
        sizes = [predicted for _, predicted in one.asked]
        for (number, _), (likelihoods, likeliest) in zip(one.asked, output_2Q.split(sizes, dim=1), strict=True):
            found[number] = (likelihoods.tolist(), bool(likeliest.all()))
    return found


def _gathered(mine: dict[int, _Answer]) -> dict[int, _Answer]:
    """Return what all ranks found."""
    if torch.distributed.get_world_size() == 1:
        return mine
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return {number: value for part in parts for number, value in part.items()}
