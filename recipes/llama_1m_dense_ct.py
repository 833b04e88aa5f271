"""A Llama of a million parameters, for questions that need many trainings: what a laptop trains in minutes.

It is the parent of `conf/ablations/laptop.yaml`, which trains it from random weights, and its dense baseline.
"""

from collections.abc import Callable
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.gpt.model.llama import LlamaConfig, LlamaModel

from nemo_upcycle.recipes import smollm2_135m_dense_ct as smollm2


NAME = "llama_1m_dense_ct"
SEQ_LENGTH = 256


@run.cli.factory(name=NAME)
def model() -> run.Config[pl.LightningModule]:
    """Factory function to create the configuration: 0.85M parameters with a vocabulary of 2048.

    Returns:
        run.Config[pl.LightningModule]: a stock NeMo Llama of small sizes.
    """
    config = run.Config(
        LlamaConfig,
        num_layers=3,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=SEQ_LENGTH,
        rotary_base=10000,
        layernorm_epsilon=1e-5,
        share_embeddings_and_output_weights=True,
        apply_rope_fusion=False,  # a kernel of Transformer Engine; without it the config refuses to be built
    )
    return run.Config(LlamaModel, config=config)


@run.cli.factory(target=pretrain, name=NAME)
def pretrain_recipe(
    dense: str,
    dir: Optional[str] = None,
    name: str = NAME,
    num_gpus_per_node: int = 1,
    data: Optional[str] = None,
    fn: Callable = pretrain,
) -> run.Partial:
    """Create a recipe that trains the small Llama on 8,192 tokens a step, from whatever weights it is given.

    Args:
        dense (str): The checkpoint to start from.
        dir (str | None): Directory for saving logs and checkpoints.
        name (str): Name of the run.
        num_gpus_per_node (int): Number of GPUs (without CUDA: processes).
        data (str | None): A finished folder of `nemo-upcycle data`; None: the blend `sotu`, built on first use.
        fn (Callable): The pretraining function to use.

    Returns:
        run.Partial: Partial configuration for pretraining.

    Examples:
        CLI usage:
            $ nemo upcycle ablate --grid laptop dir=runs/laptop --yes
    """
    recipe = smollm2.pretrain_recipe(dir, name, 1, num_gpus_per_node, dense, data, fn)
    recipe.model = model()
    recipe.data.seq_length, recipe.data.global_batch_size, recipe.data.micro_batch_size = SEQ_LENGTH, 32, 32
    recipe.trainer.max_steps = 200
    recipe.trainer.limit_val_batches, recipe.trainer.num_sanity_val_steps = 0, 0  # held-out texts say more
    recipe.trainer.val_check_interval = 1.0  # a whole number that divides max_steps would save no last checkpoint
    recipe.optim.config.lr, recipe.optim.lr_scheduler.min_lr = 1e-3, 1e-5
    recipe.optim.lr_scheduler.warmup_steps = 10
    recipe.log.ckpt.every_n_train_steps = 500
    return recipe
