"""Llama 3 8B upcycled to 8 experts, top-2: the main run of arXiv 2412.09952, and the fast run of its Table 2."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.gpt.model.llama import Llama3Config8B, LlamaModel
from nemo.collections.llm.recipes import llama3_8b

from nemo_upcycle.recipes import llama3_8b_dense_ct
from nemo_upcycle.recipes.common import moe_settings
from nemo_upcycle.recipes.h100 import chain, fast_run, moe_kernels, moe_trainer, paper_recipe
from nemo_upcycle.recipes.h100_arguments import with_overrides
from nemo_upcycle.spec import UpcycleSpec


NAME = "llama3_8b_e8t2"
SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: The paper's layout, with EP8.
trainer = moe_trainer(llama3_8b.trainer, tensor_parallelism=2, pipeline_parallelism=4, virtual_pipeline_parallelism=8)


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the upcycled Llama 3 8B configuration: 47.49B parameters, 13.67B active.

    The paper prints 34.4B and 11.8B, which omit one of the three matrices of every extra expert; its FLOPs (7.5e14 for
    a sequence of 8192) are those of the true sizes. Llama's own configuration keeps its rotary base.
    Capacity factor 4 is the paper's; with 8 experts and top-2 it can drop nothing.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the upcycled model.

    Examples:
        CLI usage:
            $ nemo llm pretrain model=llama3_8b_e8t2 ...
    """
    config = run.Config(Llama3Config8B, **moe_settings(SPEC), **moe_kernels(capacity_factor=4.0))
    return run.Config(LlamaModel, config=config)


@run.cli.factory(target=pretrain, name=NAME)
@with_overrides
def pretrain_recipe(
    dir: Optional[str] = None,
    name: str = NAME,
    num_nodes: int = 64,
    num_gpus_per_node: int = 8,
    performance_mode: bool = False,
    dense: str = "hf://meta-llama/Meta-Llama-3-8B",
    data: Optional[str] = None,
    fn: Callable = pretrain,
) -> run.Partial:
    """Create a recipe of the paper's main run: BF16, capacity factor 4, 100B tokens, learning rate 3e-5 -> 3e-7.

    Stated by the paper: 512 H100, TP2 EP8 PP4 VPP8, capacity factor 4, Mixtral-type router, experts as plain copies,
    tokens, learning rate and its schedule. Not stated, and chosen here:

    - sequences of 8192: its FLOPs fit no other length; 512 of them a step, Adam and clipping: `paper_training`;
    - no context parallelism: the list of the main run's parallelism names none (Table 2, on 128 GPUs, has CP2);
    - load-balancing loss 0.01, no z-loss: NeMo's Mixtral, and what He et al. found best; router std 0.02;
    - MoE layers recomputed in the first 500 steps: routers start unbalanced, and the paper advises it;
    - communication overlapped: eight virtual stages in place of one make eight times the messages.

    Every argument below `data` changes one setting of the run; None keeps it. Each is an override, too.

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
            $ nemo llm pretrain --factory llama3_8b_e8t2 --dryrun
            $ nemo llm pretrain --factory "llama3_8b_e8t2(data='data/redpajama', num_nodes=16)" --yes
            $ nemo llm pretrain --factory "llama3_8b_e8t2(performance_mode=True, fp8_recipe='blockwise')" --yes
            $ nemo llm pretrain --factory llama3_8b_e8t2 model.config.moe_expert_capacity_factor=2.0 --yes

        Python API usage:
            >>> recipe = pretrain_recipe(num_nodes=16)

    Note:
        A checkpoint with optimizer states takes about 665 GB: the last two are kept, and one more is written.
    """
    nemo_recipe = llama3_8b.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn)
    recipe = paper_recipe(nemo_recipe, model(), trainer, dense, SPEC, data)
    return pretrain_performance_optimizations(recipe) if performance_mode else recipe


pipeline_recipe = chain(NAME, pretrain_recipe, llama3_8b_dense_ct.pretrain_recipe)


def pretrain_performance_optimizations(recipe: run.Partial) -> run.Partial:
    """Create the fast run: the paper's 46.8 % MFU row, TP1 CP2 ETP1 EP8 PP4 VPP8 at capacity factor 1 with padding.

    Reported for 128 H100 in BF16 (462.8 TFLOP/s a GPU, counting full attention). `recipes/h100.py` says what it shares
    with NeMo's own `performance_mode`, what differs, and why. With `fp8_recipe` it is the FP8 run; NeMo calls its FP8
    precision untested for convergence, Megatron's MoE guide advises blockwise on H100.

    Args:
        recipe (run.Partial): Recipe of the upcycled model, changed in place.

    Returns:
        run.Partial: Partial configuration for performance-optimized pretraining.
    """
    return fast_run(recipe, tensor_parallelism=1, context_parallelism=2)
