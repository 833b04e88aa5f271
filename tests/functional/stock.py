"""The recipes of `examples/` at toy width: factories for `nemo llm pretrain` and `nemo upcycle pipeline`."""

# No postponed annotations: NeMo-Run reads those of factories.

from pathlib import Path
from typing import Any

import nemo_run as run
import stock_nemo_recipe
import torch
from nemo import lightning as nl
from nemo.collections import llm

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.recipes import pipeline, upcycled
from nemo_upcycle.recipes.common import start_from
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


def grown_chain(inputs: str) -> run.Partial:
    """The chain of a parent with experts: NeMo's recipe of Qwen3 30B-A3B, with twice its experts and as it is."""
    folder = Path(inputs)
    parent, data = str(folder / "qwen3_moe"), str(folder / "blend")

    def stock(name: str) -> run.Partial:
        sizes = {"kv_channels": 16, "vocab_size": 259, "moe_ffn_hidden_size": 48}
        recipe = cut(llm.qwen3_30b_a3b.pretrain_recipe(name=name), **sizes, num_moe_experts=4, moe_router_topk=2)
        strategy = recipe.trainer.strategy
        strategy.tensor_model_parallel_size, strategy.pipeline_model_parallel_size = 1, 1
        return recipe

    moe = upcycled(stock("grown"), parent, UpcycleSpec(num_experts=8, top_k=4, router_std=0.0), data)
    baseline = start_from(stock("parent"), parent, None, data)
    evaluation = str(folder / "evaluation.yaml")
    made = {"dir": str(folder / "grown"), "dense": parent, "data": data, "evaluation": evaluation}
    return run.Partial(pipeline, **made, pretrain=moe, dense_ct=baseline)
