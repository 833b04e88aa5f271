"""NeMo recipes that fine-tune on conversations: data, schedule, and the checkpoint that a recipe starts from."""

from __future__ import annotations

import fiddle as fdl
import nemo_run as run
from nemo.collections.llm.api import finetune

from nemo_upcycle.data.chat_module import chat_data
from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.recipe_table import CONVERSATIONS, RANK, Tuning
from nemo_upcycle.trainers.nemo.lora import UpcycleLoRA


def tuned(
    recipe: run.Partial,
    tuning: Tuning,
    *,
    data: str | None = None,
    start: str | None = None,
    peft_scheme: str | None = None,
) -> run.Partial:
    """Let a pretraining recipe fine-tune on conversations instead, with NeMo's `llm.finetune`.

    Model, layout, callbacks, checkpoints and the start stay as they are: an upcycling recipe still upcycles online.
    As in NeMo, the loss is the mean of the packs' mean losses, so the load-balancing loss has exactly the strength
    that is set. With `model.config.calculate_per_token_loss` the loss is the mean over all answer tokens of a step,
    and the load-balancing loss gets stronger by the factor tokens / answer tokens.

    Args:
        recipe: a pretraining recipe of this package; changed in place.
        tuning: batches, steps and the peak learning rate, which falls to a tenth along a cosine.
        data: finished folder of `nemo-upcycle chat`; None: the demo's conversations, packed on first use.
        start: checkpoint of an earlier training of the same model; it replaces the dense checkpoint.
        peft_scheme: `lora` trains adapters and routers; `none` or None trains all weights.

    Returns:
        The recipe.

    Raises:
        SpecError: `peft_scheme` is another scheme.
    """
    schedule = tuning.schedule
    by_lora = is_lora(peft_scheme)  # checked before anything is changed
    fdl.update_callable(recipe, finetune)
    recipe.tokenizer = "data"  # a model from a dense checkpoint has no tokenizer of its own
    workers = recipe.data.num_workers if "num_workers" in recipe.data.__arguments__ else 8
    recipe.data = run.Config(
        chat_data,
        dense=recipe.resume.restore_config.path,
        folder=data,
        chat=None if data else CONVERSATIONS,
        seq_length=schedule.seq_length,
        global_batch_size=schedule.global_batch,
        num_workers=workers,
    )
    recipe.model.config.seq_length = schedule.seq_length
    recipe.trainer.strategy.context_parallel_size = 1  # the conversations of a pack are not cut for several ranks
    if start:
        recipe.resume.restore_config.checkpoint = start
    recipe.trainer.max_steps = schedule.steps
    recipe.trainer.val_check_interval = max(1, schedule.steps // 4)
    recipe.trainer.limit_val_batches = 1.0  # validate on all held-out packs
    if getattr(recipe.trainer, "num_sanity_val_steps", 0):
        recipe.trainer.num_sanity_val_steps = -1  # validate on all held-out packs before the first step, too
    recipe.optim.config.lr = schedule.lr
    scheduler = recipe.optim.lr_scheduler
    scheduler.warmup_steps, scheduler.constant_steps, scheduler.min_lr = schedule.warmup_steps, 0, schedule.min_lr
    recipe.log.ckpt.every_n_train_steps = max(1, schedule.steps // 4)
    return with_lora(recipe) if by_lora else recipe


def with_lora(recipe: run.Partial, rank: int = RANK) -> run.Partial:
    """Let a fine-tuning recipe train LoRA adapters of attention and FFNs, and routers in full, instead of all weights.

    Args:
        recipe: fine-tuning recipe for one GPU, or without expert parallelism; changed in place.
        rank: rank of the adapters; their alpha is twice the rank, as in NeMo's recipes.

    Returns:
        The recipe.
    """
    recipe.peft = run.Config(UpcycleLoRA, dim=rank, alpha=2 * rank)
    # These three settings are as in NeMo's recipes, which say that the loss fusion does not work with LoRA.
    recipe.optim.config.use_distributed_optimizer = recipe.trainer.strategy.ddp.overlap_param_gather = False
    recipe.model.config.cross_entropy_loss_fusion = False
    if recipe.model.config.num_moe_experts:
        recipe.model.config.moe_grouped_gemm = False  # so that each expert has its own adapters
    return recipe


def is_lora(peft_scheme: str | None) -> bool:
    """Return whether NeMo's name of a scheme means LoRA; `none` means all weights."""
    scheme = (peft_scheme or "none").lower()
    if scheme not in ("lora", "none"):
        raise SpecError("peft_scheme", got=peft_scheme, expected="lora or none", fix="set it to lora")
    return scheme == "lora"
