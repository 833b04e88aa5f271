"""On several ranks, a norm over all heads equals PyTorch's norm on one rank, forward and backward."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.distributed.ranks import run_ranks


HEADS, DIM = 4, 8


def _normed(gradient_SBHK: torch.Tensor, heads_SBHK: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """Return this rank's normalised heads, and the gradients of these heads and of the weight."""
    from megatron.core import parallel_state

    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from nemo_upcycle.online.decoder_layers import QueryNorm

    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    norm = QueryNorm(DIM, SimpleNamespace(num_attention_heads=HEADS, params_dtype=torch.float64), eps=1e-3)
    norm.weight.data = weight
    mine = heads_SBHK.chunk(ranks, dim=2)[rank].clone().requires_grad_()
    normed = norm(mine)
    normed.backward(gradient_SBHK.chunk(ranks, dim=2)[rank])
    torch.distributed.all_reduce(norm.weight.grad)  # as Megatron does for every norm of query and key
    return [normed.detach(), mine.grad, norm.weight.grad]


def test_ranks_make_one_norm_of_their_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    gradient, heads = (torch.randn(5, 2, HEADS, DIM, dtype=torch.float64, generator=generator) for _ in range(2))
    weight = torch.rand(HEADS * DIM, dtype=torch.float64, generator=generator)
    whole = torch.nn.RMSNorm(HEADS * DIM, eps=1e-3, dtype=torch.float64)
    whole.weight.data = weight.clone()
    rows = heads.flatten(-2).requires_grad_()
    normed = whole(rows)
    normed.backward(gradient.flatten(-2))
    for ranks in (1, 2):
        found = run_ranks(_normed, ranks, gradient, heads, weight)
        got, of_heads = (torch.cat([one[number] for one in found], dim=2).flatten(-2) for number in (0, 1))
        torch.testing.assert_close(got, normed.detach())
        torch.testing.assert_close(of_heads, rows.grad)
        for one in found:
            torch.testing.assert_close(one[2], whole.weight.grad)
