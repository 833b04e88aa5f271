"""The parent as teacher: a term of the loss that keeps a tuned model near the answers of its dense parent.

The parent has answered the packs before (`calibration.teach`): its K likeliest tokens at every place that is in the
loss, and the probability of all others together. The same K + 1 numbers are taken from the student. The term is the
divergence KL(parent || student) at a temperature T, times T^2 so that its gradients keep their size. It is added to
the cross entropy of each answer token before the mean is taken, so it counts like the cross entropy in every layout
and for every kind of mean. In an upcycled model the term and its gradient start at zero.

The hook is Megatron's `compute_language_model_loss`, which both trainers' models have on the last stage of the
pipeline. A pack is found by its labels, so neither data modules nor training steps have to know of the term.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state

from nemo_upcycle.calibration.teacher import Lesson


#: Rows of logits that are looked at in float32 at a time.
_ROWS = 128


class TeacherLoss:
    """Adds the term to the loss of a model's chunks, and measures it; a `monitoring.step_metrics.Probe`.

    Args:
        lesson: the lesson to learn.
        chunks: chunks of the model on this rank, wrapped or not; changed in place.

    Example:
        >>> probe = TeacherLoss(Lesson(teacher, weight=0.5), model_chunks)  # doctest: +SKIP
    """

    def __init__(self, lesson: Lesson, chunks: list[Any]) -> None:
        self.lesson = lesson
        self._sums: torch.Tensor | None = None
        chunks[0].teacher_loss = self  # where `teacher_loss_of` finds it
        for module in (module for chunk in chunks for module in chunk.modules()):
            if hasattr(module, "compute_language_model_loss") and getattr(module, "post_process", False):
                plain = module.compute_language_model_loss
                module.compute_language_model_loss = functools.partial(self._loss, module, plain)

    def _loss(
        self,
        model: Any,
        plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        labels_BS: torch.Tensor,
        logits_SBV: torch.Tensor,
    ) -> torch.Tensor:
        """Return the loss of every token, [B, S]; a validation's stays the cross entropy alone."""
        if not model.training:
            return plain(labels_BS, logits_SBV)
        found = [self.lesson.teacher.of(labels_S) for labels_S in labels_BS.cpu()]
        (batch, length), device = labels_BS.shape, logits_SBV.device
        places = [target.places.long() for target in found]
        rows = torch.cat([places_N * batch + number for number, places_N in enumerate(places)]).to(device)
        tokens = torch.cat([target.tokens for target in found]).to(device, torch.int64)
        log_probs = torch.cat([target.log_probs for target in found]).to(device)
        terms_N = divergence(logits_SBV.flatten(0, 1), rows, tokens, log_probs, self.lesson.temperature)
        sums = torch.stack([terms_N.detach().double().sum(), terms_N.new_tensor(len(rows), dtype=torch.float64)])
        self._sums = sums if self._sums is None else self._sums + sums
        losses_BS = plain(labels_BS, logits_SBV)
        flat = torch.cat([number * length + places_N for number, places_N in enumerate(places)]).to(device)
        added = torch.zeros_like(losses_BS).flatten().index_add(0, flat, terms_N.to(losses_BS.dtype))
        return losses_BS + self.lesson.weight * added.view_as(losses_BS)

    def local(self) -> dict[str, torch.Tensor]:
        """Return the sum of the term since the last call, and of how many tokens."""
        sums, self._sums = self._sums, None
        return {"teacher": torch.zeros(2, dtype=torch.float64) if sums is None else sums}

    def describe(self, summed: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Return the mean over the answer tokens of a step, in nats, before its weight."""
        total, count = summed["teacher"].tolist()
        return {"teacher_kl": round(total / count, 8) if count else None}


def teacher_loss_of(chunks: list[Any]) -> TeacherLoss | None:
    """Return the `TeacherLoss` of a model's chunks on this rank, wrapped or not; None if they have no teacher."""
    modules = (module for chunk in chunks for module in chunk.modules())
    return next((module.teacher_loss for module in modules if "teacher_loss" in vars(module)), None)


def divergence(
    logits_TV: torch.Tensor,
    rows_N: torch.Tensor,
    tokens_NK: torch.Tensor,
    log_probs_NL: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Return KL(teacher || student) of K tokens and all others together, times the temperature squared, [N].

    Args:
        logits_TV: logits for this rank's part of the vocabulary.
        rows_N: rows of the logits to compare.
        tokens_NK: the teacher's likeliest tokens, numbers in the whole vocabulary.
        log_probs_NL: the teacher's log-probabilities of these and of all others together, L = K + 1.
        temperature: temperature at which both are compared.
    """
    student_NL = (_Coarse.apply(logits_TV, rows_N, tokens_NK) / temperature).log_softmax(-1)
    teacher_NL = (log_probs_NL / temperature).log_softmax(-1)
    return (teacher_NL.exp() * (teacher_NL - student_NL)).sum(-1) * temperature**2


class _Coarse(torch.autograd.Function):
    """Logits of K tokens of a row, and of all others together, from a vocabulary that ranks share."""

    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, rows_N: torch.Tensor, tokens_NK: torch.Tensor) -> torch.Tensor:
        """Return [N, K + 1]. The rows are copied: Megatron's cross entropy writes where the logits are."""
        group = parallel_state.get_tensor_model_parallel_group()
        size = logits_TV.shape[-1]
        places_NK = tokens_NK - group.rank() * size
        is_here_NK = (places_NK >= 0) & (places_NK < size)
        places_NK = places_NK.clamp(0, size - 1)
        picked_NV = logits_TV[rows_N]
        parts = []
        for logits, places, is_here in _in_parts(picked_NV, places_NK, is_here_NK):
            chosen = logits.gather(-1, places).masked_fill(~is_here, 0.0)
            parts.append(torch.cat([chosen, _without(logits, places, is_here).logsumexp(-1, keepdim=True)], -1))
        found_NL = torch.cat(parts) if parts else picked_NV.new_zeros(0, tokens_NK.shape[-1] + 1)
        if group.size() > 1:
            most_N1 = found_NL[:, -1:].clone()
            torch.distributed.all_reduce(most_N1, op=torch.distributed.ReduceOp.MAX, group=group)
            found_NL[:, -1:] = (found_NL[:, -1:] - most_N1).exp()
            torch.distributed.all_reduce(found_NL, group=group)
            found_NL[:, -1:] = found_NL[:, -1:].log() + most_N1
        ctx.save_for_backward(picked_NV, rows_N, places_NK, is_here_NK, found_NL[:, -1:].clone())
        ctx.shape = logits_TV.shape
        return found_NL

    @staticmethod
    def backward(ctx: Any, grad_NL: torch.Tensor) -> Any:
        """Give each chosen logit its gradient, and the others theirs by their share."""
        picked_NV, rows_N, *of_rows = ctx.saved_tensors
        grad_TV = picked_NV.new_zeros(ctx.shape)
        first = 0
        for logits, places, is_here, others, grad in _in_parts(picked_NV, *of_rows, grad_NL):
            made = (_without(logits, places, is_here) - others).exp() * grad[:, -1:]
            made.scatter_add_(-1, places, grad[:, :-1] * is_here)
            grad_TV[rows_N[first : first + len(made)]] = made.to(grad_TV.dtype)
            first += len(made)
        return grad_TV, None, None


def _in_parts(picked_NV: torch.Tensor, *others: torch.Tensor) -> Any:
    """Yield some rows at a time, the logits in float32."""
    pieces = zip(*(tensor.split(_ROWS) for tensor in (picked_NV, *others)), strict=True)
    for logits, *rest in pieces:
        yield logits.to(torch.promote_types(logits.dtype, torch.float32)), *rest


def _without(logits: torch.Tensor, places: torch.Tensor, is_here: torch.Tensor) -> torch.Tensor:
    """Return logits of which those of a row's tokens are minus infinity."""
    limits = torch.where(is_here, -torch.inf, torch.inf).to(logits.dtype)
    return logits.scatter_reduce(-1, places, limits, "amin")
