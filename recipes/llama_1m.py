"""A Llama with a million parameters, which a laptop trains in minutes, for questions that need many trainings.

In the grid of `conf/ablations/laptop.yaml`, this model is the parent, trained from random weights, and the dense
baseline. Upcycled to 8 experts with top-2 routing, it is the model of the arms (3.95M parameters, 1.30M active).
"""

from collections.abc import Callable
from typing import Any, Optional

from nemo_upcycle.planning.recipe_table import Schedule
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.recipe_arguments import with_help


SPEC = UpcycleSpec(num_experts=8, top_k=2)
#: 8,192 tokens per step.
TRAINING = Schedule(seq_length=256, global_batch=32, steps=200, lr=1e-3, min_lr=1e-5, warmup_steps=10)


def dense_model() -> Any:
    """Make the dense model in NeMo: a stock Llama with 0.85M parameters and a vocabulary of 2048."""
    import nemo_run as run
    from nemo.collections.llm.gpt.model.llama import LlamaConfig, LlamaModel

    config = run.Config(
        LlamaConfig,
        num_layers=3,
        hidden_size=128,
        ffn_hidden_size=384,
        num_attention_heads=4,
        num_query_groups=2,
        seq_length=TRAINING.seq_length,
        rotary_base=10000,
        layernorm_epsilon=1e-5,
        share_embeddings_and_output_weights=True,
        apply_rope_fusion=False,  # True needs Transformer Engine; without it the config cannot be built
    )
    return run.Config(LlamaModel, config=config)


def moe_model() -> Any:
    """Make the upcycled model in NeMo."""
    from nemo_upcycle.trainers.nemo.recipe_parts import change_model
    from nemo_upcycle.trainers.nemo.upcycled import moe_settings

    return change_model(dense_model(), **moe_settings(SPEC))


@with_help
def dense_ct(
    dense: str,
    dir: Optional[str] = None,
    name: str = "llama_1m_dense_ct",
    num_gpus_per_node: int = 1,
    data: Optional[str] = None,
    fn: Optional[Callable] = None,
) -> Any:
    """Train the small Llama in NeMo from the given weights."""
    from nemo_upcycle.trainers.nemo.few_steps_recipe import few_steps_recipe

    named = {"dir": dir, "name": name, "num_nodes": 1, "num_gpus_per_node": num_gpus_per_node, "fn": fn}
    recipe = few_steps_recipe(dense_model(), TRAINING, dense, data, **named)
    recipe.data.micro_batch_size = TRAINING.global_batch
    recipe.trainer.limit_val_batches, recipe.trainer.num_sanity_val_steps = 0, 0  # held-out scores say more
    recipe.trainer.val_check_interval = 1.0  # with a divisor of max_steps, no last checkpoint is saved
    recipe.log.ckpt.every_n_train_steps = 500
    return recipe


@with_help
def e8t2(
    dense: str,
    dir: Optional[str] = None,
    name: str = "llama_1m_e8t2",
    num_gpus_per_node: int = 1,
    data: Optional[str] = None,
    fn: Optional[Callable] = None,
) -> Any:
    """Upcycle the small Llama online and continue training in NeMo."""
    from nemo_upcycle.trainers.nemo.upcycled import start_from

    recipe = dense_ct(dense, dir, name, num_gpus_per_node, data, fn)
    return start_from(recipe, dense, SPEC)
