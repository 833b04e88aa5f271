"""Recompute the MoE layers in the first steps only, while the routers are still unbalanced."""

# Do not postpone annotations here: NeMo-Run needs them to parse `trainer.callbacks[0].steps=500`.

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from megatron.core.transformer.moe.moe_layer import MoELayer


class RecomputeFirstSteps(Callback):
    """Recomputes MoE layers in the first steps only.

    An expert keeps its tokens' activations for the backward pass, so an unbalanced router can need many times
    the memory of a balanced router. Fresh routers are unbalanced (practice 5 of arXiv 2412.09952, section 3.2).
    Recomputation repeats the forward pass of the MoE layers and changes no result. Whether a step recomputes depends
    only on the step's number, so a resumed run continues as if it had not stopped.

    Args:
        steps: number of first steps that recompute. The model's configuration must enable recomputation:
            `recompute_granularity="selective"` with `moe` among the `recompute_modules`.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(RecomputeFirstSteps, steps=500))  # doctest: +SKIP
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._layers: list[MoELayer] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the layers that recompute."""
        strategy: Any = trainer.strategy
        modules = (module for chunk in strategy.megatron_parallel for module in chunk.modules())
        self._layers = [module for module in modules if isinstance(module, MoELayer) and module.moe_layer_recompute]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Switch recomputation on or off, according to the number of the step."""
        for layer in self._layers:
            layer.moe_layer_recompute = trainer.global_step < self.steps
