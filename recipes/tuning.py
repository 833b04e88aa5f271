"""What the recipes for tuning on conversations share: the data, the schedule, and where they start."""

import inspect
from collections.abc import Callable
from typing import Any, Optional

import fiddle as fdl
import nemo_run as run
from nemo.collections.llm.api import finetune

from nemo_upcycle.data.chat_module import chat_data
from nemo_upcycle.errors import SpecError
from nemo_upcycle.pipeline.nemo.pipeline import pipeline
from nemo_upcycle.planning.recipe_table import RANK
from nemo_upcycle.trainers.nemo.lora import UpcycleLoRA


#: The conversations of a recipe that is given none: the demo's, for trying.
CONVERSATIONS = "chatterbot"


def tuned(
    recipe: run.Partial,
    *,
    data: Optional[str],
    start: Optional[str] = None,
    seq_length: int,
    global_batch_size: int,
    max_steps: int,
    lr: float,
    warmup_steps: int,
) -> run.Partial:
    """Let a recipe that trains on from a dense checkpoint tune on conversations instead, in NeMo's `llm.finetune`.

    Model, layout, callbacks, checkpoints and the way it starts stay: an upcycling recipe upcycles online. The loss is
    the mean of the packs' means, as NeMo has it, so that the load-balancing loss acts as it is set; with
    `model.config.calculate_per_token_loss` it is that of all answer tokens of a step, and the load-balancing loss acts
    stronger by the tokens over the answer tokens.

    Args:
        recipe: one of this package's `pretrain_recipe`; changed in place.
        data: a finished folder of `nemo-upcycle chat`; None: the demo's conversations, packed on first use.
        start: a checkpoint of a training of the same model to start from, in place of the dense one.
        seq_length: places of a pack.
        global_batch_size: packs of a step.
        max_steps: steps of the tuning.
        lr: highest learning rate; it falls to a tenth, by a cosine.
        warmup_steps: in which the learning rate rises.

    Returns:
        The recipe.
    """
    fdl.update_callable(recipe, finetune)
    recipe.tokenizer = "data"  # a model from a dense checkpoint brings none
    workers = recipe.data.num_workers if "num_workers" in recipe.data.__arguments__ else 8
    recipe.data = run.Config(
        chat_data,
        dense=recipe.resume.restore_config.path,
        folder=data,
        chat=None if data else CONVERSATIONS,
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        num_workers=workers,
    )
    recipe.model.config.seq_length = seq_length
    recipe.trainer.strategy.context_parallel_size = 1  # the conversations of a pack are not cut for several ranks
    if start:
        recipe.resume.restore_config.checkpoint = start
    recipe.trainer.max_steps = max_steps
    recipe.trainer.val_check_interval = max(1, max_steps // 4)
    recipe.trainer.limit_val_batches = 1.0  # all packs that are held back for it
    if getattr(recipe.trainer, "num_sanity_val_steps", 0):
        recipe.trainer.num_sanity_val_steps = -1  # all of them before the first step, too
    recipe.optim.config.lr = lr
    scheduler = recipe.optim.lr_scheduler
    scheduler.warmup_steps, scheduler.constant_steps, scheduler.min_lr = warmup_steps, 0, float(f"{lr / 10:g}")
    recipe.log.ckpt.every_n_train_steps = max(1, max_steps // 4)
    return recipe


def with_lora(recipe: run.Partial, rank: int = RANK) -> run.Partial:
    """Let a tuning train LoRA's adapters of attention and networks, and routers in full, in place of all weights.

    Args:
        recipe: a tuning on one GPU, or without expert parallelism; changed in place.
        rank: rank of the adapters; their alpha is twice as much, as in NeMo's recipes.

    Returns:
        The recipe.
    """
    recipe.peft = run.Config(UpcycleLoRA, dim=rank, alpha=2 * rank)
    # As in NeMo's recipes, which say of the fusion that it does not work with LoRA.
    recipe.optim.config.use_distributed_optimizer = recipe.trainer.strategy.ddp.overlap_param_gather = False
    recipe.model.config.cross_entropy_loss_fusion = False
    if recipe.model.config.num_moe_experts:
        recipe.model.config.moe_grouped_gemm = False  # each expert has adapters of its own
    return recipe


def tuning_recipe(name: str, base: Callable[..., run.Partial], **schedule: Any) -> Callable[..., run.Partial]:
    """Register the `finetune_recipe` of a model: that of `base`, tuned on conversations.

    Args:
        name: the recipe's.
        base: `pretrain_recipe` of the model, whose arguments for nodes, ranks and the dense checkpoint stay.
        schedule: `seq_length`, `global_batch_size`, `max_steps`, `lr` and `warmup_steps`, as `tuned` takes them; and
            `dense`, `num_nodes`, `num_gpus_per_node` and `peft_scheme`, where they are not those of `base`.
    """
    usual = {one: parameter.default for one, parameter in inspect.signature(base).parameters.items()}
    alone = 1 if "expert_parallelism" in usual and schedule.get("num_gpus_per_node") == 1 else None
    named = ("num_nodes", "num_gpus_per_node", "dense", "peft_scheme")
    nodes, ranks, parent, scheme = (schedule.pop(one, usual.get(one)) for one in named)

    @run.cli.factory(target=finetune, name=name)
    def finetune_recipe(
        dir: Optional[str] = None,
        name: str = name,
        num_nodes: int = nodes,
        num_gpus_per_node: int = ranks,
        expert_parallelism: Optional[int] = alone,
        dense: str = parent,
        data: Optional[str] = None,
        start: Optional[str] = None,
        peft_scheme: Optional[str] = scheme,
    ) -> run.Partial:
        """Create a recipe that tunes a model on conversations, with a loss on the answers alone.

        Args:
            dir (str | None): Directory for saving logs and checkpoints.
            name (str): Name of the run.
            num_nodes (int): Number of compute nodes to use.
            num_gpus_per_node (int): Number of GPUs (without CUDA: processes) per node.
            expert_parallelism (int | None): Degree of expert parallelism; None: the recipe's own.
            dense (str): The dense checkpoint to start from, and whose chat template is used.
            data (str | None): A finished folder of `nemo-upcycle chat`; None: the demo's conversations.
            start (str | None): A checkpoint of a training of this model to start from, in place of the dense one.
            peft_scheme (str | None): lora: train adapters and routers; none: all weights.

        Returns:
            run.Partial: Partial configuration for fine-tuning.

        Raises:
            SpecError: another scheme.

        Examples:
            CLI usage:
                $ nemo llm finetune --factory NAME --dryrun
                $ nemo llm finetune --factory "NAME(data='data/answers', dense='/models/Llama-3-8B-Instruct')" --yes
                $ nemo llm finetune --factory "NAME(data='data/answers', start='runs/first/pretrain')" --yes
                $ nemo llm finetune --factory "NAME(data='data/answers', peft_scheme='lora')" peft.dim=16 --yes

            Python API usage:
                >>> recipe = finetune_recipe(data="data/answers")
        """
        is_lora = _is_lora(peft_scheme)
        if is_lora and "expert_parallelism" in usual:
            expert_parallelism = expert_parallelism or 1
        given = {} if expert_parallelism is None else {"expert_parallelism": expert_parallelism}
        recipe = base(
            dir=dir, name=name, num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node, dense=dense, **given
        )
        recipe = tuned(recipe, data=data, start=start, **schedule)
        return with_lora(recipe) if is_lora else recipe

    return finetune_recipe


def _is_lora(peft_scheme: Optional[str]) -> bool:
    """Tell whether NeMo's name of a scheme is LoRA's; none is that of all weights."""
    scheme = (peft_scheme or "none").lower()
    if scheme not in ("lora", "none"):
        raise SpecError("peft_scheme", got=peft_scheme, expected="lora or none", fix="take lora")
    return scheme == "lora"


def tuning_chain(
    name: str,
    recipe: Callable[..., run.Partial],
    baseline: Callable[..., run.Partial],
    *,
    data: str = CONVERSATIONS,
    adapt: Callable[[run.Partial], run.Partial] = lambda recipe: recipe,
    **sizes: Any,
) -> Callable[..., run.Partial]:
    """Register the `pipeline_recipe` of a tuning: the whole chain, beside the dense model tuned alike.

    Args:
        name: the recipe's.
        recipe: `finetune_recipe` of the upcycled model.
        baseline: `finetune_recipe` of the dense model.
        data: the conversations, by default.
        adapt: changes the upcycled model's recipe for the machine.
        sizes: nodes and ranks of both trainings, by default; of the upcycled model's `expert_parallelism`.
    """
    experts = sizes.pop("expert_parallelism", None)
    defaults = inspect.signature(recipe).parameters
    dense, scheme = defaults["dense"].default, defaults["peft_scheme"].default

    @run.cli.factory(target=pipeline, name=name)
    def pipeline_recipe(
        dir: str = f"runs/{name}", dense: str = dense, data: str = data, peft_scheme: Optional[str] = scheme
    ) -> run.Partial:
        """Create the whole chain: import, pack, upcycle, tune, tune the dense model alike, export, evaluate, report.

        Args:
            dir (str): Folder of the run.
            dense (str): The dense parent, whose chat template is used.
            data (str): The conversations: a name in conf/chat, a YAML file, JSON lines, or a finished folder.
            peft_scheme (str | None): lora: train adapters and routers, in both tunings; none: all weights.

        Returns:
            run.Partial: Partial configuration of the pipeline.

        Examples:
            CLI usage:
                $ nemo upcycle pipeline --factory NAME dir=runs/tuned data=mine.jsonl --yes
        """
        spread = None if _is_lora(peft_scheme) else experts
        return run.Partial(
            pipeline,
            dir=dir,
            dense=dense,
            pretrain=adapt(recipe(dense=dense, expert_parallelism=spread, peft_scheme=peft_scheme, **sizes)),
            dense_ct=baseline(dense=dense, peft_scheme=peft_scheme, **sizes),
            data=data,
            evaluation="answers",
        )

    return pipeline_recipe
