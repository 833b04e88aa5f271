"""The term of a teacher: the divergence of plain PyTorch, forward and backward, on ranks that share a vocabulary."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import run_ranks


TOKENS, VOCABULARY, TOP = 300, 24, 5


def _shares(logits_NV: torch.Tensor, tokens_NK: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities of some tokens, and of all others together."""
    chosen = logits_NV.gather(-1, tokens_NK)
    others = logits_NV.scatter(-1, tokens_NK, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, others], -1).log_softmax(-1)


def _term(
    logits: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, log_probs: torch.Tensor, temperature: float
) -> list[torch.Tensor]:
    """Return the term on this rank, and the gradient of its part of the logits."""
    from megatron.core import parallel_state

    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from nemo_upcycle.trainers.teacher import divergence

    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    mine = logits.chunk(ranks, dim=-1)[rank].clone().requires_grad_()
    found = divergence(mine, rows, tokens, log_probs, temperature)
    mine_before = mine.detach().clone()
    (found * torch.arange(1.0, len(rows) + 1)).sum().backward()
    assert torch.equal(mine, mine_before)
    return [found.detach(), mine.grad]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_term_is_that_of_the_whole_vocabulary_on_any_number_of_ranks(temperature: float) -> None:
    generator = torch.Generator().manual_seed(4)
    logits, parent = (torch.randn(TOKENS, VOCABULARY, generator=generator) * 4 for _ in range(2))
    rows = torch.randperm(TOKENS, generator=generator)[:200]
    parent[rows[0]] = logits[rows[0]]  # one row that is equal already
    tokens = parent[rows].topk(TOP).indices
    log_probs = _shares(parent[rows], tokens)
    whole = logits.double().requires_grad_()
    teacher, student = (log_probs.double() / temperature).log_softmax(-1), _shares(whole[rows], tokens) / temperature
    wanted = (teacher.exp() * (teacher - student.log_softmax(-1))).sum(-1) * temperature**2
    (wanted * torch.arange(1.0, len(rows) + 1)).sum().backward()
    assert whole.grad is not None
    for ranks in (1, 2, 3):
        found = run_ranks(_term, ranks, logits, rows, tokens, log_probs, temperature)
        gradient = torch.cat([one[1] for one in found], dim=-1)
        for one in found:
            torch.testing.assert_close(one[0], wanted.detach().float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, whole.grad.float(), rtol=1e-4, atol=5e-4)
        assert found[0][0][0].abs() < 1e-6
        assert gradient[rows[0]].abs().max() < 1e-5


def test_a_teacher_that_is_sure_leaves_no_noise_in_the_gradient() -> None:
    """Where all other tokens have a millionth, their share is not the difference of one and a sum."""
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 0] = 14.0
    tokens = logits.topk(TOP).indices
    _, gradient = run_ranks(_term, 1, logits, torch.tensor([0]), tokens, _shares(logits, tokens), 1.0)[0]
    assert gradient.abs().max() < 1e-7
