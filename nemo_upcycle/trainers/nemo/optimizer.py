"""NeMo's Megatron optimizer with settings of their own for router and experts, and an annealed load-balancing loss.

NeMo's `scale_lr_cond` and `lr_mult` do not suffice: they take one factor, and its cosine scheduler does not apply it
to the minimum (`min_lr`) nor, with `constant_steps`, to any step. Here the scheduler sees plain learning rates and the
factors act within Megatron's own step only, so they work with every scheduler and no checkpoint holds them.
"""

# No `from __future__ import annotations`: NeMo-Run reads `optim.router_lr_mult=4` by the annotations below.

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Optional

import fiddle as fdl
import lightning.pytorch as pl
import torch
from megatron.core import optimizer as megatron
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.lightning.pytorch.optim import LRSchedulerModule

from nemo_upcycle.trainers.schedules import (
    EXPERTS,
    MARKS,
    ROUTER,
    annealed_configs,
    describe,
    part_of,
    scale_within_step,
    schedules_of,
)
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.progress import show_messages


class UpcycleOptimizer(nl.MegatronOptimizerModule):
    """`nl.MegatronOptimizerModule` for upcycled models; every setting is neutral by default.

    A frozen part keeps its bits: its learning rate is 0, so neither gradient, momentum nor weight decay reach it, and
    float32 masters stay what they are. Adam's moments of it are kept up to date meanwhile: Megatron counts one step
    for all parameters, and moments that began later would be taken for old ones, which makes the first free update
    (1 - beta1) / sqrt(1 - beta2) times the right one. So the gradients of frozen parts are computed, and count in the
    norm for clipping.

    A run has to start with this class to resume with it: NeMo's own makes other parameter groups.

    Args:
        config: Megatron's optimizer settings.
        lr_scheduler: NeMo's scheduler. It sees learning rates without factors; `lr` in the logs is that of the rest.
        no_weight_decay_cond: NeMo's condition.
        router_lr_mult: factor on the router's learning rate, at every step.
        expert_lr_mult: factor on the routed experts' learning rate, at every step.
        router_warmup_steps: number of first optimizer steps in which the router trains and the experts are frozen.
        router_warmup_freezes: `experts`, or `all` to freeze everything but the router in these steps.
        aux_loss_end: coefficient of the load-balancing loss after `aux_loss_steps`; it starts at the model's
            `moe_aux_loss_coeff`.
        aux_loss_steps: optimizer steps until then; 0 keeps the model's coefficient.
        aux_loss_shape: `cosine` or `linear`.

    Raises:
        SpecError: a value is out of range, or asks for what the model does not have.

    Example:
        >>> fdl.update_callable(recipe.optim, UpcycleOptimizer)  # doctest: +SKIP
        >>> recipe.optim.router_lr_mult, recipe.optim.router_warmup_steps = 4.0, 100  # doctest: +SKIP
    """

    def __init__(
        self,
        config: OptimizerConfig,
        lr_scheduler: Optional[LRSchedulerModule] = None,  # noqa: UP045
        no_weight_decay_cond: Optional[Callable] = None,  # noqa: UP045
        router_lr_mult: float = 1.0,
        expert_lr_mult: float = 1.0,
        router_warmup_steps: int = 0,
        router_warmup_freezes: str = "experts",
        aux_loss_end: float = 0.0,
        aux_loss_steps: int = 0,
        aux_loss_shape: str = "cosine",
    ) -> None:
        super().__init__(config, lr_scheduler=lr_scheduler, no_weight_decay_cond=no_weight_decay_cond)
        self.factors, self.aux_loss = schedules_of(
            router_lr_mult,
            expert_lr_mult,
            router_warmup_steps,
            router_warmup_freezes,
            aux_loss_end,
            aux_loss_steps,
            aux_loss_shape,
        )
        self._router_configs: list[Any] = []

    def connect(self, model: pl.LightningModule) -> None:
        """Connect to the model; its checkpoints name NeMo's own optimizer module, so that plain NeMo opens them."""
        super().connect(model)
        if recorded := getattr(getattr(model, "__io__", None), "optim", None):
            fdl.update_callable(recorded, nl.MegatronOptimizerModule, drop_invalid_args=True)

    def optimizers(self, model: Any) -> list[torch.optim.Optimizer]:
        """Build Megatron's optimizer with groups for router, experts and the rest."""
        build = functools.partial(_build_groups_by_part, megatron._get_param_groups)
        with temporarily_set(megatron, "_get_param_groups", build):
            (optimizer,) = super().optimizers(model)
        for group in optimizer.param_groups:
            group["lr"] = group["pre_mult_lr"]  # NeMo has multiplied it by the mark
        if not self.factors.is_neutral:
            scale_within_step(
                optimizer.mcore_optimizer,
                "pre_lr_mult",
                lambda part: self.factors.of(part, model.trainer.global_step),
            )
        self._start_anneal(model)
        return [optimizer]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report what differs from a plain run."""
        if torch.distributed.get_rank() == 0:
            for line in describe(self.factors, self.aux_loss):
                show_messages().info("%s", line)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the step's load-balancing coefficient; log it and the scaled learning rates."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        step = trainer.global_step
        if self.aux_loss.steps:
            self._set_aux_loss(self.aux_loss.at(step))
            pl_module.log("aux_loss_coeff", self.aux_loss.at(step), batch_size=1)
        groups = self._optimizers[0].param_groups
        if groups and not self.factors.is_neutral:
            for part in (ROUTER, EXPERTS):
                pl_module.log(f"lr_{part}", groups[0]["lr"] * self.factors.of(part, step), batch_size=1)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the model's configuration."""
        if self.aux_loss.steps:
            self._set_aux_loss(self.aux_loss.start)

    def _start_anneal(self, model: Any) -> None:
        if not self.aux_loss.steps:
            return
        config = model.trainer.lightning_module.config
        self._router_configs = annealed_configs(config, [model], "optim.aux_loss_steps")
        self.aux_loss = replace(self.aux_loss, start=config.moe_aux_loss_coeff)

    def _set_aux_loss(self, coefficient: float) -> None:
        for config in self._router_configs:  # the router asks its configuration at every forward pass
            config.moe_aux_loss_coeff = coefficient


def _build_groups_by_part(
    build: Callable[..., list[dict[str, Any]]], chunks: list[torch.nn.Module], *args: Any, **kwargs: Any
) -> list[dict[str, Any]]:
    """Build parameter groups for router, experts and the rest with Megatron's `build`, marked in `lr_mult`.

    Megatron-Core 0.15 can set one kind of parameter apart by its arguments, not two. Its function is called once for
    each part, on every rank, because the ranks agree on the groups within it.
    """
    return [
        {**group, "lr_mult": mark}
        for part, mark in MARKS.items()
        for group in build([_OnePart(chunk, part) for chunk in chunks], *args, **kwargs)
    ]


class _OnePart:
    """A view of a model chunk with the parameters of one part only."""

    def __init__(self, chunk: torch.nn.Module, part: str) -> None:
        self._chunk, self._part = chunk, part

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Yield names and parameters of the part."""
        return ((name, param) for name, param in self._chunk.named_parameters() if part_of(name) == self._part)
