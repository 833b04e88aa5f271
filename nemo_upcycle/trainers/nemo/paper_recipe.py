"""Build the parts of NeMo's recipes for H100 clusters: the paper's training, the fast run and the dense baseline.

How they differ from `performance_mode` of NeMo's own recipes, and why:

- NeMo's Mixtral sets EP1 TP8; experts cut by eight leave small matrices and an all-reduce in every layer. Here experts
  are spread (EP8) and never cut (expert-tensor parallelism 1): the paper's fastest row, and NeMo's own tuned row for
  Mixtral 8x7B on H100 in `scripts/performance`.
- Gradients are reduced in bfloat16 under `performance_mode` alone, as in NeMo's and Megatron-Bridge's. Else they stay
  in float32: a run that starts from a trained model makes small steps (3e-5), and a sum over 512 sequences in 8 bits
  of mantissa may lose them (derived, not measured). The plain layouts have room for it.
- Overlap of tensor-parallel communication stays off: experimental, and its tuned buffers are for other shapes.
- What is the same: capacity factor 1 with padding (`MegatronTokenDropCallback`'s values, set in the model's
  configuration, where an override finds them), manual garbage collection, overlap of pipeline and data-parallel
  communication.
- What is added so that a long run survives: `resilient`.
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
from nemo_upcycle.trainers.nemo.loss_guard import LossGuard
from nemo_upcycle.trainers.nemo.recipe_parts import checkpoints
from nemo_upcycle.trainers.nemo.stopping import SaveOnSignal, StopOnSignal
from nemo_upcycle.trainers.nemo.upcycled import start_from
from nemo_upcycle.trainers.nemo.watchers import hang_detection, straggler_report
from nemo_upcycle.trainers.recipe_arguments import adjust


#: Of Llama 3 and 3.1, whose configurations do not name it; the last id is the mock tokenizer's end of document.
VOCABULARY = 128_256
#: How long the fresh routers are given to find balance before activations of the MoE layers are kept.
RECOMPUTE_MOE_STEPS = 500
#: Checkpoints kept: the last one, and the one before it. A loss that went wrong is often seen only after the next
#: save, and a file that storage lost must not cost the run. More are a matter of room: one of an upcycled 8B model
#: takes 619 GiB, and while one is written there is one more. `log.ckpt.keep_every=5000` keeps some for good.
KEEP_LAST = 2


def paper_training(recipe: run.Partial, schedule: Schedule) -> run.Partial:
    """Set schedule and data of a recipe of NeMo's for a dense model, in place.

    Stated by the paper: 100B tokens, learning rate 3e-5 to 3e-7, cosine, 100 steps of warm-up. Kept as NeMo has them,
    for the paper does not say: batches of 512 x 8192 tokens (4.2M, what He et al., arXiv 2410.07524, found best), Adam
    (0.9, 0.95), weight decay 0.1, clipping at 1. docs/schedules.md has what other upcyclings took. The mock data has
    the model's vocabulary and needs no file.

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
    """Add what keeps a run on hundreds of GPUs going to a recipe, in place.

    - `LossGuard`: a loss that is not a number ends the run before it is saved; on all ranks at once, with a message.
    - `ddp.check_for_nan_in_grad` off: Megatron's check ends one rank alone; the others wait until NCCL gives up.
    - `hang_detection`: under `ft_launcher`, a rank that is silent too long has all ranks restarted; else nothing.
    - `straggler_report`: one slow GPU slows all; the run is not ended, because a person has to judge.
    - `SaveOnSignal`: a job that is taken away saves after its present step, and loses none.
    - `RetainedCheckpoints`: see `KEEP_LAST`.

    Asynchronous checkpoints are on in NeMo's recipes already (`strategy.ckpt_async_save`): training waits only for the
    copy to host memory.

    Args:
        recipe: returned by `start_from`.

    Returns:
        The recipe.
    """
    recipe.log.ckpt = checkpoints(paper.CHECKPOINT_STEPS, keep_last=KEEP_LAST)
    recipe.trainer.strategy.ddp.check_for_nan_in_grad = False
    # The guard comes before what writes a step's metrics or a checkpoint. Saving on a signal comes after the step's
    # metrics; the callback that ends at once follows, because it restores the handlers that both replace.
    added = [run.Config(hang_detection), run.Config(straggler_report), run.Config(SaveOnSignal)]
    others = [item for item in recipe.trainer.callbacks if item.__fn_or_cls__ is not StopOnSignal]
    recipe.trainer.callbacks = [run.Config(LossGuard), *others, *added, run.Config(StopOnSignal)]
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
    """Make the recipe that upcycles a dense model and trains on as the paper does, on H100s.

    Tensor parallelism does not cut the experts: they are spread over eight ranks.

    Args:
        nemo_recipe: NeMo's recipe module of the dense model; its optimizer, log and callbacks are taken.
        model: the upcycled model.
        layout: the layout.
        schedule: steps, batches and learning rates.
        spec: how to upcycle.
        dense: the dense checkpoint to start from.
        data: a finished folder of `nemo-upcycle data`; None: NeMo's mock data.
        trainer_of: NeMo's recipe module whose trainer is taken; None: `nemo_recipe`.
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
    nothing needs recomputation. Tokens beyond the capacity are dropped, so the model of step 0 is not quite the dense
    one. Gradients are reduced in bfloat16.

    Args:
        recipe: an upcycled model's.
        layout: layout whose TP and CP the fast run takes.
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
    """Make the recipe of a dense baseline: the dense model, trained as the upcycled one is.

    Args:
        nemo_recipe: NeMo's recipe module; its trainer, optimizer, log and callbacks are taken.
        model: the dense model.
        layout: the layout.
        schedule: steps, batches and learning rates.
        dense: the dense checkpoint to start from.
        data: a finished folder of `nemo-upcycle data`; None: NeMo's mock data.
        performance_mode: NeMo's own optimizations of the model.
        named: see `upcycled_recipe`.
    """
    recipe = _pretrain_recipe(nemo_recipe, **named)
    recipe.model = model
    recipe = paper_training(recipe, schedule)
    if performance_mode:  # not an argument of all of NeMo's recipes
        recipe = nemo_recipe.pretrain_performance_optimizations(recipe)
    strategy = recipe.trainer.strategy
    strategy.tensor_model_parallel_size = layout.tp
    strategy.pipeline_model_parallel_size = layout.pp
    strategy.virtual_pipeline_model_parallel_size = layout.vp
    strategy.context_parallel_size = layout.cp
    strategy.sequence_parallel = layout.tp > 1
    return resilient(start_from(recipe, dense, None, data))
