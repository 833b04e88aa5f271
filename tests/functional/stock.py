"""The recipes of `examples/` at toy width: factories for `nemo llm pretrain` and `nemo upcycle pipeline`."""

# No postponed annotations: NeMo-Run reads those of factories.

from pathlib import Path
from typing import Any

import my_recipes
import nemo_run as run
import stock_nemo_recipe
import torch
from nemo import lightning as nl

from nemo_upcycle import UpcycleSpec
from tests.functional.tiny import BATCH, SEQUENCE, SIZES


SPEC = UpcycleSpec(num_experts=4, top_k=2)


def cut(recipe: run.Partial, **sizes: Any) -> run.Partial:
    """Cut a recipe down to toy width, for a machine without a GPU; all else is NeMo's."""
    for name, value in ({**SIZES, **sizes, "apply_rope_fusion": False}).items():
        setattr(recipe.model.config, name, value)
    return cut_training(recipe)


def cut_training(recipe: run.Partial) -> run.Partial:
    """Let a recipe train three small steps, on a machine without a GPU."""
    recipe.data.seq_length, recipe.data.global_batch_size, recipe.data.num_workers = SEQUENCE, BATCH, 0
    trainer = recipe.trainer
    trainer.accelerator, trainer.devices, trainer.max_steps = "auto", 1, 3
    trainer.limit_val_batches, trainer.limit_test_batches, trainer.val_check_interval = 0, 0, 1.0
    trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="32", params_dtype=torch.float32)
    trainer.strategy.expert_model_parallel_size = 1
    return recipe


def llama(parent: str, dir: str = "runs", data: str = "") -> run.Partial:
    """NeMo's recipe of Llama 3.2 1B, upcycled."""
    return cut(stock_nemo_recipe.stock_llama32_e8t2(parent, dir, data or None))


def chain(inputs: str) -> run.Partial:
    """The chain of a user's own recipes."""
    folder = Path(inputs)
    made = my_recipes.chain(str(folder / "llama"), str(folder / "run"))
    made.data, made.evaluation = str(folder / "blend"), str(folder / "evaluation.yaml")
    cut(made.pretrain)
    cut(made.dense_ct)
    return made
