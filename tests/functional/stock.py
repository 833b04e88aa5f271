"""The recipes of `examples/` at toy width: factories for `nemo llm pretrain`."""

# No postponed annotations, because NeMo-Run reads the annotations of factories.

from typing import Any

import nemo_run as run
import stock_nemo_recipe
import torch
from nemo import lightning as nl

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.recipes import upcycled_from
from tests.functional.tiny import BATCH, SEQUENCE, SIZES


SPEC = UpcycleSpec(num_experts=4, top_k=2)


def cut(recipe: run.Partial, **sizes: Any) -> run.Partial:
    """Shrink a recipe to toy width and three small steps without a GPU; all other settings stay NeMo's."""
    for name, value in ({**SIZES, **sizes, "apply_rope_fusion": False}).items():
        setattr(recipe.model.config, name, value)
    recipe.data.seq_length, recipe.data.global_batch_size, recipe.data.num_workers = SEQUENCE, BATCH, 0
    trainer = recipe.trainer
    trainer.accelerator, trainer.devices, trainer.max_steps = "auto", 1, 3
    trainer.limit_val_batches, trainer.limit_test_batches, trainer.val_check_interval = 0, 0, 1.0
    trainer.strategy.expert_model_parallel_size = 1
    return in_float32(recipe)


def in_float32(recipe: run.Partial) -> run.Partial:
    """Make a recipe compute in float32, whatever the processor supports."""
    recipe.trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="32", params_dtype=torch.float32)
    return recipe


def made_from(parent: str, spec: UpcycleSpec | None, **others: Any) -> run.Partial:
    """Return a recipe that trains a parent for three small steps."""
    sizes = {"seq_length": SEQUENCE, "global_batch_size": BATCH, "max_steps": 3, "lr": 1e-4}
    return in_float32(upcycled_from(parent, spec=spec, **sizes | others))


def llama(parent: str, dir: str = "runs", data: str = "") -> run.Partial:
    """Return NeMo's recipe of Llama 3.2 1B, upcycled."""
    return cut(stock_nemo_recipe.stock_llama32_e8t2(parent, dir, data or None))
