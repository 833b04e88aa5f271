"""A user's own file: NeMo's stock recipes, upcycled; factories for `nemo llm pretrain` and `nemo upcycle pipeline`."""

# No postponed annotations: NeMo-Run reads those of factories.

from pathlib import Path
from typing import Any

import nemo_run as run
import torch
from nemo import lightning as nl
from nemo.collections import llm

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.pipeline.nemo_pipeline import pipeline
from nemo_upcycle.recipes import upcycled
from tests.functional.tiny import BATCH, SEQUENCE, SIZES


SPEC = UpcycleSpec(num_experts=4, top_k=2)


def cut(recipe: run.Partial, **sizes: Any) -> run.Partial:
    """Cut a stock recipe down to toy width, for a machine without a GPU; all else is NeMo's."""
    for name, value in ({**SIZES, **sizes, "apply_rope_fusion": False}).items():
        setattr(recipe.model.config, name, value)
    recipe.data.seq_length, recipe.data.global_batch_size, recipe.data.num_workers = SEQUENCE, BATCH, 0
    trainer = recipe.trainer
    trainer.accelerator, trainer.devices, trainer.max_steps = "auto", 1, 3
    trainer.limit_val_batches, trainer.limit_test_batches, trainer.val_check_interval = 0, 0, 1.0
    trainer.plugins = run.Config(nl.MegatronMixedPrecision, precision="32", params_dtype=torch.float32)
    return recipe


def llama(parent: str, dir: str = "runs", data: str = "") -> run.Partial:
    """Upcycle with NeMo's recipe of Llama 3.2 1B."""
    return upcycled(
        cut(llm.llama32_1b.pretrain_recipe(dir=dir, name="mine")), dense=parent, spec=SPEC, data=data or None
    )


def chain(inputs: str) -> run.Partial:
    """The chain of that training."""
    folder, parent = Path(inputs), str(Path(inputs) / "llama")
    blend, evaluation = str(folder / "blend"), str(folder / "evaluation.yaml")
    return run.Partial(
        pipeline, dir=str(folder / "run"), dense=parent, pretrain=llama(parent), data=blend, evaluation=evaluation
    )
