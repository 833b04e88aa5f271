"""Llama 3.1 8B upcycled to 8 experts, top-2, trained as in arXiv 2412.09952. RoPE scaling is kept."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.gpt.model.llama import Llama31Config8B, LlamaModel
from nemo.collections.llm.recipes import llama31_8b

from nemo_upcycle.recipes import llama31_8b_dense_ct
from nemo_upcycle.recipes.common import moe_settings
from nemo_upcycle.recipes.h100 import chain, moe_kernels, paper_recipe
from nemo_upcycle.recipes.h100_arguments import with_overrides
from nemo_upcycle.recipes.llama3_8b_e8t2 import SPEC, pretrain_performance_optimizations, trainer


NAME = "llama31_8b_e8t2"


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Llama 3.1 8B configuration: 47.49B parameters, 13.67B active.

    Llama 3.1's own configuration scales the rotary frequencies (factor 8); NeMo's Mixtral has no field for it, and
    would change the logits silently. Sequences of 8192 in place of 131072, as in NeMo's recipe.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the upcycled model.

    Examples:
        CLI usage:
            $ nemo llm pretrain model=llama31_8b_e8t2 ...
    """
    config = run.Config(Llama31Config8B, seq_length=8192, **moe_settings(SPEC), **moe_kernels(capacity_factor=4.0))
    return run.Config(LlamaModel, config=config)


@run.cli.factory(target=pretrain, name=NAME)
@with_overrides
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = "hf://meta-llama/Llama-3.1-8B",
    data: Optional[str] = None,
    fn: Callable = pretrain,
) -> run.Partial:
    """Create the recipe of `llama3_8b_e8t2` for Llama 3.1 8B: the same sizes, layout and training.

    The paper did not train it. Every argument below `data` changes one setting; None keeps it.

    Args:
        dir (str | None): Directory for saving logs and checkpoints.
        name (str): Name of the run.
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs per node.
        performance_mode (bool): The fast run, see `pretrain_performance_optimizations`.
        dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
        data (str | None): A finished folder of `nemo-upcycle data`; None: NeMo's mock data, random tokens.
        fn (Callable): The pretraining function to use.

    Returns:
        run.Partial: Partial configuration for pretraining.

    Examples:
        CLI usage:
            $ nemo llm pretrain --factory llama31_8b_e8t2 --dryrun
            $ nemo llm pretrain --factory "llama31_8b_e8t2(performance_mode=True, num_nodes=16)" --yes

    Note:
        A checkpoint with optimizer states takes about 665 GB: the last two are kept, and one more is written.
    """
    nemo_recipe = llama31_8b.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn)
    recipe = paper_recipe(nemo_recipe, model(), trainer, dense, SPEC, data)
    return pretrain_performance_optimizations(recipe) if performance_mode else recipe


pipeline_recipe = chain(NAME, pretrain_recipe, llama31_8b_dense_ct.pretrain_recipe)
