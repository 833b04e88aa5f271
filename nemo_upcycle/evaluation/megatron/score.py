"""Log-likelihoods of token sequences from a Megatron model of any layout, whether built here or in training.

All ranks of the job call `score` together, with the same sequences. Each replica computes its part of the sequences,
and all ranks get the answers of the last pipeline stage. Logits are never gathered. Instead, each rank reduces its
part of the vocabulary to the largest logit, the sum of exponentials, and the logit of the token to score. Sequences
that differ only in their last token, such as the answers A to D, go through the model once.

Legend: N rows of a pass, S tokens of the longest row, V vocabulary, P positions that predict a token to score,
Q questions (a position and a token).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.megatron.forward import evaluating, forward, gathered, padded_length


#: A sequence to score: its token ids, and how many of its last tokens are predicted (never the first token).
Scored = tuple[Sequence[int], int]
#: A row: its input tokens, and the numbers of the sequences that it answers.
Row = tuple[tuple[int, ...], list[int]]
#: Tokens of one pass with `batch_size="auto"`: the logits of 8,192 tokens take 4 GiB with a vocabulary of 128,256.
AUTO_TOKENS = 8192
#: Positions whose logits are converted to float32 at a time: half a GiB with a vocabulary of 128,256.
SLICE = 1024
_Answer = tuple[list[float], bool]
#: Number of passes in a row, as a multiple of the pipeline's stages. The factor 4 keeps at least three quarters of the
#: stages busy.
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
        chunks: chunks of this rank, from `build_chunks` or from a training job, wrapped or not.
        sequences: token ids below `vocab_size`, and how many tokens at the end are predicted; the same list on every
            rank.
        vocab_size: V without padding, because rows that only pad the embedding are no tokens.
        batch_size: sequences in one pass, or `auto` for `AUTO_TOKENS` tokens.
        progress: function that is called after some passes, with the number of sequences that these passes completed.

    Returns:
        For each sequence the log-likelihoods in nats, and whether each predicted token is the likeliest.

    Raises:
        UpcycleError: the model gives NaN or infinity.

    Example:
        >>> score(chunks, [([1, 523, 12, 7], 2)], vocab_size=32000)  # doctest: +SKIP
        [([-3.2, -0.4], False)]
    """
    from megatron.core import parallel_state

    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    rows = list(_rows_of(sequences).items())
    batches = list(_batches_of([len(inputs) for inputs, _ in rows], batch_size))
    in_a_row = 1 if stages == 1 else _PASSES_PER_STAGE * stages
    # Every replica makes the same number of passes, because ranks that share experts wait for each other in each pass.
    # An interleaved schedule needs whole groups of passes.
    multiple = replicas * (chunks[0].config.microbatch_group_size_per_vp_stage if len(chunks) > 1 else 1)
    answers: dict[int, _Answer] = {}
    with evaluating(chunks):
        for start in range(0, len(batches), in_a_row * replicas):
            together = [[rows[row] for row in batch] for batch in batches[start : start + in_a_row * replicas]]
            count = -(-len(together) // multiple) * multiple
            # Batches of similar length run at the same time.
            batches_here = [
                together[number] if number < len(together) else [] for number in range(replica, count, replicas)
            ]
            size = max(map(len, together))
            length = padded_length(max(len(inputs) for batch in together for inputs, _ in batch), chunks[0])
            answers |= _run(chunks, [_Pass(sequences, batch, size, length) for batch in batches_here], vocab_size)
            if progress:
                progress(sum(len(numbers) for batch in together for _, numbers in batch))
    answers = gathered(answers)
    _check_finite(answers)
    return [answers[number] for number in range(len(sequences))]


def _check_finite(answers: dict[int, _Answer]) -> None:
    wrong = [number for number, (likelihoods, _) in answers.items() if not all(map(math.isfinite, likelihoods))]
    if wrong:
        raise UpcycleError(
            f"Log-likelihoods of {len(wrong)} of {len(answers)} texts",
            kind="state",
            got="are NaN or infinity",
            fix="run nemo-upcycle export, which names a tensor with NaN. A diverged run cannot be scored",
        )


def _run(chunks: Sequence[Any], passes: Sequence[_Pass], vocab_size: int) -> dict[int, _Answer]:
    """Run this replica's passes through the pipeline; on the last stage, return answers by sequence number."""
    config = chunks[0].config
    asked_only = not config.sequence_parallel and config.context_parallel_size == 1
    outputs = forward(
        chunks,
        [one.tokens_NS for one in passes],
        lambda logits, number: passes[number].answers(logits, vocab_size, asked_only=asked_only),
        positions=[(one.rows_P, one.places_P) for one in passes] if asked_only else None,
    )
    answers = {}
    for one, output_2Q in zip(passes, outputs, strict=False):
        sizes = [predicted for _, predicted in one.asked]
        for (number, _), (likelihoods, likeliest) in zip(one.asked, output_2Q.split(sizes, dim=1), strict=True):
            answers[number] = (likelihoods.tolist(), bool(likeliest.all()))
    return answers


def _rows_of(sequences: Sequence[Scored]) -> dict[tuple[int, ...], list[int]]:
    """Return the numbers of the sequences, grouped by all tokens except the last."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for number, (tokens, _) in enumerate(sequences):
        rows.setdefault(tuple(tokens[:-1]), []).append(number)
    return rows


def _batches_of(lengths: Sequence[int], batch_size: int | str) -> Iterator[list[int]]:
    """Yield groups of row indices. A group goes through the model together, and the longest rows come first."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    start = 0
    while start < len(order):
        size = max(1, AUTO_TOKENS // lengths[order[start]]) if batch_size == "auto" else int(batch_size)
        yield order[start : start + size]
        start += size


class _Pass:
    """Rows that go through the model together, and the questions that they answer.

    Args:
        sequences: all sequences to score.
        batch: inputs of each row, and the numbers of the sequences that it answers.
        size: N, at least the number of rows in the batch.
        length: S. Rows are padded to this length with zeros at the end. The zeros have no effect, because no token
            sees later tokens.
    """

    def __init__(self, sequences: Sequence[Scored], batch: Sequence[Row], size: int, length: int) -> None:
        self.length = length
        tokens_NS = torch.zeros(size, length, dtype=torch.long)
        self.asked: list[tuple[int, int]] = []  # number of the sequence, tokens predicted
        positions: dict[tuple[int, int], int] = {}
        questions = []
        for row, (inputs, numbers) in enumerate(batch):
            tokens_NS[row, : len(inputs)] = torch.tensor(inputs)
            for number in numbers:
                tokens, predicted = sequences[number]
                self.asked.append((number, predicted))
                for place in range(len(inputs) - predicted, len(inputs)):
                    position = positions.setdefault((row, place), len(positions))
                    questions.append((position, tokens[place + 1]))
        self.rows_P, self.places_P = torch.tensor(list(positions), dtype=torch.long).view(-1, 2).T
        self.position_Q, self.token_Q = torch.tensor(questions, dtype=torch.long).view(-1, 2).T
        here_S = _places_here(length)
        self.tokens_NS = tokens_NS[:, here_S].to("cuda" if torch.cuda.is_available() else "cpu")
        # Index of each place in this rank's part of the sequences; -1 if the place is on another rank.
        self.local_S = torch.full((length,), -1).scatter(0, here_S, torch.arange(len(here_S)))

    def answers(self, logits_NSV: torch.Tensor, vocab_size: int, *, asked_only: bool) -> torch.Tensor:
        """Return log-likelihoods of the tokens and whether each is the likeliest, [2, Q], from this rank's part of V.

        Args:
            logits_NSV: logits of all positions, or [1, P, V].
            vocab_size: V without padding.
            asked_only: whether the logits cover only the positions that predict a token to score.
        """
        from megatron.core import parallel_state

        group, device = parallel_state.get_tensor_model_parallel_group(), logits_NSV.device
        first = parallel_state.get_tensor_model_parallel_rank() * logits_NSV.shape[-1]
        real = max(0, min(logits_NSV.shape[-1], vocab_size - first))  # the last rows only pad the vocabulary
        rows_P, place_P = self.rows_P, self.local_S[self.places_P]
        if asked_only:
            rows_P, place_P = torch.zeros_like(rows_P), torch.arange(len(rows_P))
        position_Q, token_Q = self.position_Q, self.token_Q - first
        largest_P, sum_P = (torch.full((len(place_P),), start, device=device) for start in (-torch.inf, 0.0))
        own_Q = torch.zeros(len(token_Q), device=device)
        for start in range(0, len(place_P), SLICE):  # never all positions in float32
            stop = min(start + SLICE, len(place_P))
            rows, places = rows_P[start:stop].to(device), place_P[start:stop].clamp(min=0).to(device)
            logits_PV = logits_NSV[rows, places, :real].float()
            largest = logits_PV.amax(dim=1) if real else largest_P[start:stop]
            torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group=group)
            largest_P[start:stop] = largest
            asked = (position_Q >= start) & (position_Q < stop) & (token_Q >= 0) & (token_Q < real)
            own_Q[asked.to(device)] = logits_PV[(position_Q[asked] - start).to(device), token_Q[asked].to(device)]
            sum_P[start:stop] = logits_PV.sub_(largest[:, None]).exp_().sum(dim=1)
        for part in (sum_P, own_Q):
            torch.distributed.all_reduce(part, group=group)
        position_Q = position_Q.to(device)
        largest_Q = largest_P[position_Q]
        answers_2Q = torch.stack([own_Q - largest_Q - sum_P[position_Q].log(), (own_Q >= largest_Q).float()])
        if parallel_state.get_context_parallel_world_size() > 1:
            answers_2Q *= (place_P >= 0).to(device)[position_Q]
            torch.distributed.all_reduce(answers_2Q, group=parallel_state.get_context_parallel_group())
        return answers_2Q.cpu()


def _places_here(length: int) -> torch.Tensor:
    """Return the places of a sequence that this rank holds: with context parallelism, a part of each half."""
    from megatron.core import parallel_state

    parts, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if parts == 1:
        return torch.arange(length)
    pieces = torch.arange(length).view(2 * parts, -1)
    return torch.cat([pieces[rank], pieces[2 * parts - 1 - rank]])
