"""Adam for Megatron on a CPU: torch's fused kernel behind the interface of the Adam that Megatron uses on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class FusedCpuAdam(torch.optim.Optimizer):
    """Adam or AdamW with one step count per parameter group, as in Apex and Transformer Engine.

    With `torch.optim.AdamW`, Megatron 0.15's distributed optimizer cannot be saved, because each parameter's
    zero-dimensional `step` fails an assertion. After a checkpoint is loaded, all parameters share one `step` tensor,
    which the update of every parameter then increments. Here the parameter group holds the count, so neither problem
    arises, and the optimizer's part of a checkpoint has the same format as in a GPU run.

    Args:
        params: float32 CPU parameters or parameter groups.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        adam_w_mode: True for decoupled weight decay (AdamW), False for L2 regularisation (Adam).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        adam_w_mode: bool = True,
        capturable: bool = False,  # whether a CUDA graph can capture the steps
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient; return the result of `closure`, if there is one.

        First give unused memory of the backward pass back to the system. The tensors of the next step do not fit into
        the gaps of this memory, so without this the memory of a demo rank grows by 0.3 GiB.
        """
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # only in glibc
            trim(0)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state(param) for param in params]
        update = adamw if self.adam_w_mode else adam
        update(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [torch.tensor(float(group.get("step", 0))) for _ in params],  # the kernel adds one before it computes
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        group["step"] = group.get("step", 0) + 1

    def _state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        return state
