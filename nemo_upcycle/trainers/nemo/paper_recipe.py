"""Parts of the NeMo recipes for H100 clusters: the paper's training, the fast run and the dense baseline.

The recipes differ from `performance_mode` of NeMo's own recipes:

- NeMo's Mixtral sets EP1 TP8. Cutting experts by eight leaves small matrices and an all-reduce in every layer. Here
  experts are spread (EP8) and never cut (expert-tensor parallelism 1). This is the paper's fastest layout, and NeMo's
  own tuned layout for Mixtral 8x7B on H100 in `scripts/performance`.
- Gradients are reduced in bfloat16 only under `performance_mode`, as in NeMo's and Megatron-Bridge's recipes.
  Otherwise they stay in float32. A run that starts from a trained model makes small steps (3e-5), and a sum over 512
  sequences with 8 bits of mantissa may lose them (derived, not measured). The plain layouts have room for float32.
- Overlap of tensor-parallel communication stays off, because it is experimental and its tuned buffers are for other
  shapes.
- `resilient` is added so that a long run survives failures.

The recipes and `performance_mode` share these settings: capacity factor 1 with padding (the values of
`MegatronTokenDropCallback`, set in the model's configuration so that overrides find them), manual garbage collection,
and overlap of pipeline and data-parallel communication.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import nemo_run as run
import torch
from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback

from nemo_upcycle.planning.recipe_table import Run, Schedule
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers import paper
from nemo_upcycle.trainers.nemo.recipe_parts import checkpoints
from nemo_upcycle.trainers.nemo.stopping import SaveOnSignal, StopOnSignal
from nemo_upcycle.trainers.nemo.upcycled import start_from
from nemo_upcycle.trainers.nemo.watchers import hang_detection, straggler_report
from nemo_upcycle.trainers.recipe_arguments import adjust


#: Vocabulary size of Llama 3 and 3.1, whose NeMo configurations do not set it; the mock tokenizer uses the last id as
#: end of document.
VOCABULARY = 128_256
#: Number of first steps in which MoE layers are recomputed, because fresh routers are not balanced yet.
RECOMPUTE_MOE_STEPS = 500
#: Number of checkpoints to keep: the last checkpoint and the one before it. A bad loss is often noticed only after the
#: next save, and a run must survive if the storage loses a file. Keeping more checkpoints needs room: a
#: checkpoint of an upcycled 8B model takes 619 GiB, and there is one more while a checkpoint is written.
KEEP_LAST = 2


def paper_training(recipe: run.Partial, schedule: Schedule) -> run.Partial:
    """Set the schedule and the data of a NeMo recipe for a dense model, in place.

    The paper states 100B tokens, a cosine learning rate from 3e-5 to 3e-7, and 100 warm-up steps. It does not state
    the batch size and the optimizer, so NeMo's values stay: batches of 512 x 8192 tokens (4.2M, which He et al., arXiv
    2410.07524, found best), Adam (0.9, 0.95), weight decay 0.1, gradient clipping at 1. docs/schedules.md lists the
    schedules of other upcyclings. The mock data has the model's vocabulary and needs no file.

    Args:
        recipe: the recipe.
        schedule: steps, batches and learning rates.
    """
    if recipe.model.config.seq_length != schedule.seq_length:
        recipe.model.config.seq_length = schedule.seq_length
    recipe.trainer.max_steps = schedule.steps
    recipe.trainer.plugins.grad_reduce_in_fp32 = True
    recipe.optim.config.lr = schedule.lr
    recipe.optim.lr_scheduler.warmup_steps = schedule.warmup_steps
    recipe.optim.lr_scheduler.constant_steps = 0
    recipe.optim.lr_scheduler.min_lr = schedule.min_lr
    recipe.data.seq_length = schedule.seq_length
    recipe.data.global_batch_size = schedule.global_batch
    vocabulary = getattr(recipe.model.config, "vocab_size", None) or VOCABULARY
    recipe.data.tokenizer = run.Config(NullTokenizer, vocab_size=vocabulary - 1)
    return recipe


def resilient(recipe: run.Partial) -> run.Partial:
    """Change a recipe in place so that a run on hundreds of GPUs survives failures.

    - `ddp.check_for_nan_in_grad` off: Megatron's check ends one rank alone, and the others wait until NCCL gives up.
    - `hang_detection`: under `ft_launcher`, restarts all ranks if one rank is silent for too long.
    - `straggler_report`: reports a slow GPU, which slows all others. It does not end the run: a person has to judge.
    - `SaveOnSignal`: a preempted job saves after its current step and loses no step.
    - `RetainedCheckpoints`: see `KEEP_LAST` and `paper.KEEP_EVERY`.

    NeMo's recipes already save checkpoints asynchronously (`strategy.ckpt_async_save`): training waits only for the
    copy to host memory.

    Args:
        recipe: recipe returned by `start_from`.

    Returns:
        The recipe.
    """
    recipe.log.ckpt = checkpoints(paper.CHECKPOINT_STEPS, keep_last=KEEP_LAST)
    recipe.log.ckpt.keep_every = paper.KEEP_EVERY
    recipe.trainer.strategy.ddp.check_for_nan_in_grad = False
    # SaveOnSignal comes after the callback that writes the step's metrics. StopOnSignal comes last, because it
    # restores the handlers that the callbacks before it replace.
    added = [run.Config(hang_detection), run.Config(straggler_report), run.Config(SaveOnSignal)]
    others = [item for item in recipe.trainer.callbacks if item.__fn_or_cls__ is not StopOnSignal]
    recipe.trainer.callbacks = [*others, *added, run.Config(StopOnSignal)]
    return recipe


def upcycled_recipe(
    nemo_recipe: ModuleType,
    model: run.Config,
    layout: Run,
    schedule: Schedule,
    spec: UpcycleSpec,
    dense: str,
    data: str | None,
    *,
    trainer_of: ModuleType | None = None,
    **named: Any,
) -> run.Partial:
    """Make the recipe that upcycles a dense model and trains it on H100s as the paper does.

    Tensor parallelism does not cut the experts. They are spread over eight ranks.

    Args:
        nemo_recipe: NeMo's recipe module of the dense model; supplies the optimizer, the log and the callbacks.
        model: the upcycled model.
        layout: the layout.
        schedule: steps, batches and learning rates.
        spec: how to upcycle.
        dense: dense checkpoint to start from.
        data: finished folder of `nemo-upcycle data`; None: NeMo's mock data.
        trainer_of: NeMo's recipe module that supplies the trainer; None: `nemo_recipe`.
        named: `dir`, `name`, `num_nodes`, `num_gpus_per_node` and `fn`, as NeMo's `pretrain_recipe` takes them.
    """
    recipe = _pretrain_recipe(nemo_recipe, **named)
    recipe.model = model
    recipe = paper_training(recipe, schedule)
    recipe.trainer = (trainer_of or nemo_recipe).trainer(
        tensor_parallelism=layout.tp,
        pipeline_parallelism=layout.pp,
        pipeline_parallelism_type=torch.bfloat16,
        virtual_pipeline_parallelism=layout.vp,
        context_parallelism=layout.cp,
        sequence_parallelism=layout.tp > 1,
        num_nodes=named["num_nodes"],
        num_gpus_per_node=named["num_gpus_per_node"],
        max_steps=schedule.steps,
        callbacks=recipe.trainer.callbacks,
    )
    recipe.trainer.strategy.expert_model_parallel_size = 8
    recipe.trainer.strategy.expert_tensor_parallel_size = 1
    recipe = resilient(start_from(recipe, dense, spec, data))
    return adjust(recipe, recompute_moe_steps=RECOMPUTE_MOE_STEPS, comm_overlap=True)


def _pretrain_recipe(nemo_recipe: ModuleType, fn: Any = None, **named: Any) -> run.Partial:
    return nemo_recipe.pretrain_recipe(**named, **({"fn": fn} if fn else {}))


def fast_run(recipe: run.Partial, layout: Run) -> run.Partial:
    """Turn a recipe into its fast run, in place: capacity factor 1 with padding, communication overlapped.

    Every expert computes exactly its capacity, so shapes are static, memory does not depend on the router, and
    nothing needs recomputation. Tokens beyond the capacity are dropped, so at step 0 the model is not exactly the
    dense model. Gradients are reduced in bfloat16.

    Args:
        recipe: recipe of an upcycled model.
        layout: layout whose TP and CP the fast run uses.
    """
    recipe.trainer.callbacks = [
        *(recipe.trainer.callbacks or []),
        run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
    ]
    recipe.trainer.plugins.grad_reduce_in_fp32 = recipe.trainer.strategy.ddp.grad_reduce_in_fp32 = False
    return adjust(
        recipe,
        capacity_factor=1.0,
        pad_to_capacity=True,
        recompute_moe_steps=0,
        comm_overlap=True,
        tensor_parallelism=layout.tp,
        context_parallelism=layout.cp,
    )


def dense_recipe(
    nemo_recipe: ModuleType,
    model: run.Config,
    layout: Run,
    schedule: Schedule,
    dense: str,
    data: str | None,
    *,
    performance_mode: bool = False,
    **named: Any,
) -> run.Partial:
    """Make the recipe of a dense baseline: the dense model, trained in the same way as the upcycled model.

    Args:
        nemo_recipe: NeMo's recipe module; supplies the trainer, the optimizer, the log and the callbacks.
        model: the dense model.
        layout: the layout.
        schedule: steps, batches and learning rates.
        dense: dense checkpoint to start from.
        data: finished folder of `nemo-upcycle data`; None: NeMo's mock data.
        performance_mode: whether to apply NeMo's own optimizations of the model.
        named: see `upcycled_recipe`.
    """
    recipe = _pretrain_recipe(nemo_recipe, **named)
    recipe.model = model
    recipe = paper_training(recipe, schedule)
    if performance_mode:  # called directly, because not every NeMo recipe has this argument
        recipe = nemo_recipe.pretrain_performance_optimizations(recipe)
    strategy = recipe.trainer.strategy
    strategy.tensor_model_parallel_size = layout.tp
    strategy.pipeline_model_parallel_size = layout.pp
    strategy.virtual_pipeline_model_parallel_size = layout.vp
    strategy.context_parallel_size = layout.cp
    strategy.sequence_parallel = layout.tp > 1
    return resilient(start_from(recipe, dense, None, data))
