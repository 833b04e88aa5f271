"""SmolLM2-135M, trained on as a dense model: the baseline that `smollm2_135m_e8t2` has to beat on the same data."""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from lightning.pytorch.callbacks.callback import Callback
from nemo import lightning as nl
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.gpt.model.llama import LlamaConfig, LlamaModel
from nemo.collections.llm.recipes import llama3_8b
from nemo.collections.llm.recipes.log.default import default_log, default_resume
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing

from nemo_upcycle.data.blend_module import blend_data
from nemo_upcycle.recipes.common import checkpoints, in_float32_if_faster, start_from, validate


NAME = "smollm2_135m_dense_ct"
DENSE = "asset://smollm2-135m"
#: 6 steps of 2 x 512 tokens: what two CPU cores do in a few minutes.
MAX_STEPS = 6


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the SmolLM2-135M configuration (134.5M parameters).

    Returns:
        run.Config[pl.LightningModule]: a stock NeMo Llama with SmolLM2's sizes.
    """
    config = run.Config(
        LlamaConfig,
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        seq_length=512,
        rotary_base=100000,
        layernorm_epsilon=1e-5,
        share_embeddings_and_output_weights=True,
        recompute_granularity="selective",  # attention scores: a third of the activations, unfused
        apply_rope_fusion=False,  # a kernel of Transformer Engine; without it the config refuses to be built
    )
    return run.Config(LlamaModel, config=config)


def trainer(
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    max_steps: int = MAX_STEPS,
    callbacks: Optional[list[run.Config[Callback]]] = None,
) -> run.Config[nl.Trainer]:
    """Configure the NeMo Lightning Trainer: NeMo's own for Llama 3, without model parallelism, on whatever is there.

    Args:
        num_nodes (int): Number of compute nodes to use.
        num_gpus_per_node (int): Number of GPUs (without CUDA: processes) per node.
        max_steps (int): Maximum number of training steps.
        callbacks (list[run.Config[Callback]] | None): List of callback configurations.

    Returns:
        run.Config[nl.Trainer]: Configuration for the NeMo Lightning Trainer.
    """
    config = llama3_8b.trainer(
        context_parallelism=1,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        max_steps=max_steps,
        callbacks=callbacks,
    )
    config.accelerator = "auto"
    config.log_every_n_steps = 1
    validate(config, times=2)
    # Without a GPU an asynchronous save forks this process while it goes on changing its memory, which doubles it.
    config.strategy.ckpt_async_save = False
    if not torch.cuda.is_available():
        in_float32_if_faster(config)
    return config


def baseline_recipe(
    name: str, dense: str, model: Callable[[], run.Config[pl.LightningModule]]
) -> Callable[..., run.Partial]:
    """Register the `pretrain_recipe` of a small dense model, which trains on for a few steps.

    Args:
        name: the recipe's.
        dense: the checkpoint to start from, by default.
        model: makes the dense model.
    """

    @run.cli.factory(target=pretrain, name=name)
    def pretrain_recipe(
        dir: Optional[str] = None,
        name: str = name,
        num_nodes: int = 1,
        num_gpus_per_node: int = 1,
        dense: str = dense,
        data: Optional[str] = None,
        fn: Callable = pretrain,
    ) -> run.Partial:
        """Create a recipe that continues the pretraining of a small dense model.

        Args:
            dir (str | None): Directory for saving logs and checkpoints.
            name (str): Name of the run.
            num_nodes (int): Number of compute nodes to use.
            num_gpus_per_node (int): Number of GPUs (without CUDA: processes) per node.
            dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
            data (str | None): A finished folder of `nemo-upcycle data`; None: the blend `sotu`, built on first use.
            fn (Callable): The pretraining function to use.

        Returns:
            run.Partial: Partial configuration for pretraining.

        Examples:
            CLI usage:
                $ nemo llm pretrain --factory smollm2_135m_dense_ct trainer.max_steps=4 --yes
                $ nemo llm pretrain --factory "qwen3_600m_dense_ct(dense='/models/Qwen3-0.6B')" --yes
        """
        recipe = run.Partial(
            fn,
            model=model(),
            trainer=trainer(num_nodes, num_gpus_per_node),
            data=run.Config(
                blend_data,
                dense=dense,
                blend="sotu",
                seq_length=512,
                global_batch_size=2,
                micro_batch_size=1,
                num_workers=0,
            ),
            log=default_log(dir=dir, name=name),
            # The peak of the upcycling run in the paper is 3e-5 on 8B parameters; small models tolerate more. For few
            # steps, without a source: docs/schedules.md has what longer trainings took.
            optim=distributed_fused_adam_with_cosine_annealing(
                warmup_steps=2, constant_steps=0, max_lr=1e-4, min_lr=1e-5
            ),
            resume=default_resume(),
        )
        recipe.log.ckpt = checkpoints(every_n_steps=10)
        return start_from(recipe, dense, None, data)

    return pretrain_recipe


pretrain_recipe = baseline_recipe(NAME, DENSE, model)
