"""Continue prompts greedily with a Megatron model of any layout and its cache of keys and values.

Prompts of different lengths go through the model together, without padding. The first tokens, up to the length of the
shortest prompt, are read at once. After that, every row takes its next token from its prompt. After the end of the
prompt, the row takes the likeliest token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nemo_upcycle.evaluation.megatron.forward import evaluating, forward, gathered


@dataclass
class _Row:
    """A prompt, its continuation, and whether the continuation has ended."""

    number: int
    prompt: Sequence[int]
    written: list[int] = field(default_factory=list)
    ended: bool = False


def generate(
    chunks: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    ends: Callable[[int, list[int]], bool],
    vocab_size: int,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Return the likeliest continuation of every prompt, the same on all ranks.

    Args:
        chunks: chunks of this rank, from `build_chunks`.
        prompts: token ids, at least one per prompt; the same list on every rank.
        most: maximum number of tokens in a continuation.
        ends: function that gets a prompt's number and the continuation so far, and says whether the continuation is
            complete.
        vocab_size: V without padding.
        batch_size: prompts in one pass.
        progress: function that is called after some prompts, with the number of these prompts.

    Example:
        >>> generate(chunks, [[1, 523]], most=8, ends=lambda *_: False, vocab_size=32000)  # doctest: +SKIP
        [[12, 7, 99, 4, 12, 7, 99, 4]]
    """
    from megatron.core import parallel_state

    replicas, replica = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    continuations: dict[int, list[int]] = {}
    with evaluating(chunks):
        for start in range(0, len(order), batch_size * replicas):
            together = order[start : start + batch_size * replicas]
            # A replica without prompts repeats the first prompt, because ranks that share experts wait for each other.
            rows = [_Row(number, prompts[number]) for number in together[replica::replicas] or together[:1]]
            lengths = [len(prompts[number]) for number in together]
            _continue(chunks, rows, min(lengths), max(lengths), most, ends, vocab_size)
            continuations |= gathered({row.number: row.written for row in rows})
            if progress:
                progress(len(together))
    return [continuations[number] for number in range(len(prompts))]


def _continue(
    chunks: Sequence[Any],
    rows: Sequence[_Row],
    shortest: int,
    longest: int,
    most: int,
    ends: Callable[[int, list[int]], bool],
    vocab_size: int,
) -> None:
    """Write the continuations of some prompts of this replica, in step with the other replicas."""
    from megatron.core import parallel_state
    from megatron.core.inference.contexts import StaticInferenceContext

    device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    idle = [_Row(-1, rows[0].prompt, ended=True)] * (-len(rows) % stages)  # every stage gets a part of the rows
    rows = [*rows, *idle]
    context = StaticInferenceContext(max_batch_size=len(rows), max_sequence_length=longest + most)
    context.materialize_only_last_token_logits = True
    tokens_NS = torch.tensor([list(row.prompt[:shortest]) for row in rows], device=device)
    for position in range(shortest, longest + most):
        likeliest = _likeliest(chunks, tokens_NS.chunk(stages), context, vocab_size)
        context.sequence_len_offset = position
        nexts = []
        for row, token in zip(rows, likeliest, strict=True):
            in_prompt = position < len(row.prompt)
            if not in_prompt and not row.ended:
                row.written.append(token)
                row.ended = len(row.written) == most or ends(row.number, row.written)
            nexts.append(row.prompt[position] if in_prompt else token)
        left = torch.tensor([sum(not row.ended for row in rows)], device=device)
        torch.distributed.all_reduce(left)
        if not left.item():
            return
        tokens_NS = torch.tensor(nexts, device=device)[:, None]


def _likeliest(chunks: Sequence[Any], passes: Sequence[torch.Tensor], context: Any, vocab_size: int) -> list[int]:
    """Return the likeliest next token of every row, on all stages of this pipeline."""
    from megatron.core import parallel_state

    likeliest = forward(chunks, passes, lambda logits_NSV, _: logits_NSV[:, -1, :vocab_size].argmax(dim=-1), context)
    token_N = torch.cat(likeliest or [tokens_NS.new_empty(len(tokens_NS)) for tokens_NS in passes])
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        last = parallel_state.get_pipeline_model_parallel_last_rank()
        torch.distributed.broadcast(token_N, last, group=parallel_state.get_pipeline_model_parallel_group())
    return [int(token) for token in token_N]
