"""Rows that go through a model together, and what is asked of them.

Legend: N rows of a pass, S tokens of the longest, V vocabulary, P positions that predict something asked for, Q
questions: a position and a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch


#: A sequence to score: its token ids, and how many of the last of them are predicted. The first never is.
Scored = tuple[Sequence[int], int]
#: A row: its inputs, and the numbers of the sequences that it answers.
Row = tuple[tuple[int, ...], list[int]]
#: Tokens of one pass with `batch_size="auto"`: the logits of 8,192 tokens are 4 GiB of a vocabulary of 128,256.
AUTO_TOKENS = 8192
#: Positions whose logits are turned to float32 at a time: half a GiB of such a vocabulary.
SLICE = 1024


def rows_of(sequences: Sequence[Scored]) -> dict[tuple[int, ...], list[int]]:
    """Return the numbers of the sequences by all of their tokens but the last."""
    found: dict[tuple[int, ...], list[int]] = {}
    for number, (tokens, _) in enumerate(sequences):
        found.setdefault(tuple(tokens[:-1]), []).append(number)
    return found


def batches_of(lengths: Sequence[int], batch_size: int | str) -> Iterator[list[int]]:
    """Yield the numbers of rows that go through the model together, the longest first."""
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    start = 0
    while start < len(order):
        size = max(1, AUTO_TOKENS // lengths[order[start]]) if batch_size == "auto" else int(batch_size)
        yield order[start : start + size]
        start += size


class Pass:
    """Rows that go through the model together, and what is asked of them.

    Args:
        sequences: all of them.
        batch: of each row the inputs, and the numbers of the sequences that it answers.
        size: N, at least as many as rows in the batch.
        length: S, to which rows are padded with zeros behind: no token sees what comes after it.
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
        # Where each place is in this rank's part of the sequences; -1: on another rank.
        self.local_S = torch.full((length,), -1).scatter(0, here_S, torch.arange(len(here_S)))

    def answers(self, logits_NSV: torch.Tensor, vocab_size: int, *, asked_only: bool) -> torch.Tensor:
        """Return the tokens' log-likelihoods and whether each is the likeliest, [2, Q], from this rank's part of V.

        Args:
            logits_NSV: of all positions, or [1, P, V].
            vocab_size: V without padding.
            asked_only: whether they are of the positions alone that predict something asked for.
        """
        from megatron.core import parallel_state

        group, device = parallel_state.get_tensor_model_parallel_group(), logits_NSV.device
        first = parallel_state.get_tensor_model_parallel_rank() * logits_NSV.shape[-1]
        real = max(0, min(logits_NSV.shape[-1], vocab_size - first))  # the rows behind only pad the vocabulary
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
        found_2Q = torch.stack([own_Q - largest_Q - sum_P[position_Q].log(), (own_Q >= largest_Q).float()])
        if parallel_state.get_context_parallel_world_size() > 1:
            found_2Q *= (place_P >= 0).to(device)[position_Q]
            torch.distributed.all_reduce(found_2Q, group=parallel_state.get_context_parallel_group())
        return found_2Q.cpu()


def _places_here(length: int) -> torch.Tensor:
    """Return the places of a sequence that this rank holds: with context parallelism a part of each half."""
    from megatron.core import parallel_state

    parts, mine = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if parts == 1:
        return torch.arange(length)
    pieces = torch.arange(length).view(2 * parts, -1)
    return torch.cat([pieces[mine], pieces[2 * parts - 1 - mine]])
