"""What every upcycling recipe does to the NeMo recipe it derives from."""

from __future__ import annotations

from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo import lightning as nl

from nemo_upcycle.models.megatron_config import router_fields
from nemo_upcycle.pipeline.recipes_io import train_on, use_spec
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.training.metrics import MetricsLogger
from nemo_upcycle.training.optimizer import UpcycleOptimizer
from nemo_upcycle.training.resume import UpcycleResume
from nemo_upcycle.training.retention import RetainedCheckpoints
from nemo_upcycle.training.stopping import StopOnSignal
from nemo_upcycle.training.upcycling import UpcycleConfig, UpcycleStrategy


__all__ = ["checkpoints", "moe_settings", "start_from", "use_spec"]


def moe_settings(spec: UpcycleSpec) -> dict[str, Any]:
    """Return the fields of a NeMo model config that turn the dense family's own config into the upcycled model's.

    The load-balancing loss is the one of NeMo's Mixtral: 0.01, which He et al. (arXiv 2410.07524) found best as well.
    """
    fields = router_fields(spec)
    return {name: fields[name] for name in ("num_moe_experts", "moe_router_topk", "moe_router_pre_softmax")} | {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.01,
        "moe_token_dispatcher_type": "alltoall",
    }


def start_from(recipe: run.Partial, dense: str, spec: UpcycleSpec | None, data: str | None = None) -> run.Partial:
    """Let a training recipe start from a dense checkpoint, upcycled online or as it is, and train on a data folder.

    Args:
        recipe: a NeMo pretraining recipe; changed in place.
        dense: a Hugging Face folder, `hf://ORG/NAME` or `asset://smollm2-135m`.
        spec: how to upcycle; None continues the dense model.
        data: a finished folder of `nemo-upcycle data`, made with the dense model's tokenizer; None keeps the recipe's
            data.

    Returns:
        The recipe.
    """
    fdl.update_callable(recipe.trainer.strategy, UpcycleStrategy)
    fdl.update_callable(recipe.resume, UpcycleResume)
    recipe.resume.restore_config = run.Config(
        UpcycleConfig, path=dense, spec=run.Config(UpcycleSpec, **spec.to_dict()) if spec else None
    )
    if spec:  # its settings are neutral, but only a run that starts with it can resume with it
        fdl.update_callable(recipe.optim, UpcycleOptimizer)
    if data is not None:
        train_on(recipe, data, dense)
    own = (MetricsLogger, StopOnSignal)  # a recipe may derive from one that has them
    others = [callback for callback in recipe.trainer.callbacks or [] if callback.__fn_or_cls__ not in own]
    recipe.trainer.callbacks = [*others, *map(run.Config, own)]
    return recipe


def checkpoints(every_n_steps: int, keep_last: int = 1) -> run.Config[nl.ModelCheckpoint]:
    """Return a checkpoint callback that keeps the last state only, or few of them.

    NeMo's default keeps the ten best, every 15 minutes: 6.6 TB for an upcycled 8B model.

    Args:
        every_n_steps: steps between two checkpoints.
        keep_last: how many of the newest to keep.
    """
    return run.Config(
        RetainedCheckpoints,
        keep_last=keep_last,
        save_last=True,
        save_top_k=0,
        save_optim_on_train_end=True,  # else a finished run cannot be trained further
        monitor=None,
        every_n_train_steps=every_n_steps,
        filename="{model_name}--{step}",
    )
