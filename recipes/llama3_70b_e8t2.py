"""Llama 3 70B upcycled to 8 experts, top-2, trained as in arXiv 2412.09952 on the layout of Parallel Folding."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.gpt.model.llama import Llama3Config70B, LlamaModel
from nemo.collections.llm.recipes import llama3_70b

from nemo_upcycle.recipes import llama3_70b_dense_ct
from nemo_upcycle.recipes.common import moe_settings
from nemo_upcycle.recipes.h100 import chain, fast_run, moe_kernels, moe_trainer, paper_recipe
from nemo_upcycle.recipes.h100_arguments import with_overrides
from nemo_upcycle.recipes.llama3_8b_e8t2 import SPEC


NAME = "llama3_70b_e8t2"
trainer = moe_trainer(
    llama3_70b.trainer,
    tensor_parallelism=8,
    pipeline_parallelism=16,
    virtual_pipeline_parallelism=5,
    context_parallelism=2,
)


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Llama 3 70B configuration: 465.16B parameters, 126.93B active.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the upcycled model.

    Examples:
        CLI usage:
            $ nemo llm pretrain model=llama3_70b_e8t2 ...
    """
    config = run.Config(Llama3Config70B, **moe_settings(SPEC), **moe_kernels(capacity_factor=4.0))
    return run.Config(LlamaModel, config=config)


@run.cli.factory(target=pretrain, name=NAME)
@with_overrides
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = "hf://meta-llama/Meta-Llama-3-70B",
    data: Optional[str] = None,
    fn: Callable = pretrain,
) -> run.Partial:
    """Create a recipe that trains the upcycled Llama 3 70B as the paper trains the 8B.

    The paper has no 70B. TP8 EP8 PP16 is what Parallel Folding (arXiv 2504.14960) reports for Llama3-8x70B: 41.6 % MFU
    on 256 H100 with sequences of 4096. Chosen here: sequences of 8192, cut in two (CP2), so that a rank holds as many
    tokens as there; one layer in each chunk (VPP5); 512 H100, on which model states take about 32 GiB of each
    (derived, not measured). Everything else as in `llama3_8b_e8t2`. Every argument below `data` changes one setting;
    None keeps it.

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
            $ nemo llm pretrain --factory llama3_70b_e8t2 --dryrun
            $ nemo llm pretrain --factory "llama3_70b_e8t2(performance_mode=True, fp8_recipe='blockwise')" --yes

    Note:
        A checkpoint with optimizer states takes about 6.5 TB: the last two are kept, and one more is written.
    """
    nemo_recipe = llama3_70b.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn)
    recipe = paper_recipe(nemo_recipe, model(), trainer, dense, SPEC, data)
    return pretrain_performance_optimizations(recipe) if performance_mode else recipe


pipeline_recipe = chain(NAME, pretrain_recipe, llama3_70b_dense_ct.pretrain_recipe)


def pretrain_performance_optimizations(recipe: run.Partial) -> run.Partial:
    """Create the fast run: capacity factor 1 with padding on the same layout, communication overlapped.

    `recipes/h100.py` says what it shares with NeMo's own `performance_mode`, what differs, and why.

    Args:
        recipe (run.Partial): Recipe of the upcycled model, changed in place.

    Returns:
        run.Partial: Partial configuration for performance-optimized pretraining.
    """
    return fast_run(recipe, tensor_parallelism=8, context_parallelism=2)
