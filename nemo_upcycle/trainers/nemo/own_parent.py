"""A recipe for any parent that NeMo has a model for, made from the parent's folder; needs no NeMo recipe."""

from __future__ import annotations

import nemo_run as run
import torch
from nemo.collections.llm.api import pretrain
from nemo.collections.llm.recipes import llama3_8b
from nemo.collections.llm.recipes.log.default import default_log, default_resume
from nemo.collections.llm.recipes.optim.adam import distributed_fused_adam_with_cosine_annealing

from nemo_upcycle.data.blend import DEMO
from nemo_upcycle.data.blend_module import blend_data
from nemo_upcycle.planning.layout import CPU_RANKS
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers import paper
from nemo_upcycle.trainers.nemo.paper_recipe import RECOMPUTE_MOE_STEPS
from nemo_upcycle.trainers.nemo.parent_model import parent_model
from nemo_upcycle.trainers.nemo.recipe_parts import (
    checkpoints,
    in_float32_if_faster,
    recompute_layers,
    validate,
)
from nemo_upcycle.trainers.nemo.upcycled import start_from
from nemo_upcycle.trainers.recipe_arguments import adjust, moe_kernels
from nemo_upcycle.utils.validation import check_named, check_number, check_whole


def upcycled_from(
    dense: str,
    *,
    spec: UpcycleSpec | None,
    seq_length: int,
    global_batch_size: int,
    max_steps: int,
    lr: float,
    micro_batch_size: int = 1,
    min_lr: float | None = None,
    warmup_steps: int = 0,
    num_nodes: int = 1,
    num_gpus_per_node: int = 1,
    tensor_parallelism: int = 1,
    pipeline_parallelism: int = 1,
    context_parallelism: int = 1,
    expert_parallelism: int = 1,
    data: str | None = None,
    dir: str | None = None,
    name: str = "upcycled",
    accelerator: str | None = None,
) -> run.Partial:
    """Make the recipe that upcycles a parent and trains the result, or its dense baseline, from the parent's folder.

    Adam, gradient clipping and precision are set as in NeMo's Llama 3 recipe. Experts have no capacity limit. On GPUs
    the MoE layers are recomputed until the routers have had time to balance (`RECOMPUTE_MOE_STEPS`). The recipe
    validates five times (once without a GPU) and keeps the last checkpoint.

    Args:
        dense: parent: a folder, `hf://ORG/NAME`, `asset://NAME` or `nemo:///absolute/path`; a folder needs only
            `config.json` until the training starts.
        spec: how to upcycle the parent; None: train the parent as it is (the dense baseline).
        seq_length: tokens of a sequence.
        global_batch_size: sequences of a step, over all ranks.
        max_steps: steps of the training.
        lr: peak learning rate; a good start is a tenth of the parent's own peak (3e-5 for Llama 3 8B).
        micro_batch_size: sequences of a micro-batch.
        min_lr: learning rate at the end of the cosine; None: a tenth of the peak.
        warmup_steps: steps until the peak.
        num_nodes: compute nodes.
        num_gpus_per_node: GPUs of a node; without a GPU, processes.
        tensor_parallelism: number of parts that attention and dense networks are cut into, with sequence parallelism.
        pipeline_parallelism: number of stages that the layers are divided into.
        context_parallelism: ranks that share a sequence.
        expert_parallelism: ranks that the experts are spread over; ignored for a model without experts.
        data: finished folder of `nemo-upcycle data`; a chain sets it. None: without a GPU, the demo texts are used;
            with GPUs, the training is refused when it starts.
        dir: folder for logs and checkpoints; a chain sets it.
        name: name of the run.
        accelerator: `gpu` (even if this machine has none and the recipe is for a cluster) or `cpu`; None: `gpu` if
            this machine has a GPU or the recipe asks for more than two ranks.

    Returns:
        The recipe, a `run.Partial` of `llm.pretrain`.

    Raises:
        UpcycleError: there is no such parent, or NeMo cannot train it.
        SpecError: a number is out of range, or a name is empty.

    Example:
        >>> recipe = upcycled_from(  # doctest: +SKIP
        ...     "/models/mine",
        ...     spec=UpcycleSpec(num_experts=8, top_k=2),
        ...     seq_length=4096,
        ...     global_batch_size=256,
        ...     max_steps=10_000,
        ...     lr=3e-5,
        ...     warmup_steps=100,
        ...     num_gpus_per_node=8,
        ...     expert_parallelism=8,
        ...     data="/data/mine",
        ... )
    """
    whole = {"seq_length": seq_length, "global_batch_size": global_batch_size, "micro_batch_size": micro_batch_size}
    whole |= {"max_steps": max_steps, "num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node}
    whole |= {"tensor_parallelism": tensor_parallelism, "pipeline_parallelism": pipeline_parallelism}
    whole |= {"context_parallelism": context_parallelism, "expert_parallelism": expert_parallelism}
    for argument, value in whole.items():
        check_whole(argument, value, 1)
    check_whole("warmup_steps", warmup_steps, 0)
    check_number("lr", lr, 0.0)
    check_number("min_lr", lr / 10 if min_lr is None else min_lr, 0.0, lr)
    for argument, text in {"dense": dense, "data": data, "dir": dir, "name": name}.items():
        check_named(argument, text)
    if accelerator is None:
        has_gpus = torch.cuda.is_available() or num_nodes * num_gpus_per_node > CPU_RANKS
        accelerator = "gpu" if has_gpus else "cpu"
    model = parent_model(dense, seq_length)
    trainer = llama3_8b.trainer(
        tensor_parallelism=tensor_parallelism,
        pipeline_parallelism=pipeline_parallelism,
        context_parallelism=context_parallelism,
        sequence_parallelism=tensor_parallelism > 1,
        num_nodes=num_nodes,
        num_gpus_per_node=num_gpus_per_node,
        max_steps=max_steps,
    )
    validate(trainer, times=5 if accelerator == "gpu" else 1)
    recipe = run.Partial(
        pretrain,
        model=model,
        trainer=trainer,
        data=run.Config(
            blend_data,
            dense=dense,
            **({"folder": data} if data else {"blend": DEMO}),
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
        ),
        log=default_log(dir=dir, name=name),
        optim=distributed_fused_adam_with_cosine_annealing(
            warmup_steps=warmup_steps, max_lr=lr, min_lr=lr / 10 if min_lr is None else min_lr
        ),
        resume=default_resume(),
    )
    recipe.log.ckpt = checkpoints(paper.CHECKPOINT_STEPS)
    start_from(recipe, dense, spec)
    if model.config.num_moe_experts:
        trainer.strategy.expert_model_parallel_size = expert_parallelism
        if expert_parallelism > 1:
            trainer.strategy.expert_tensor_parallel_size = 1  # experts are spread over ranks, not cut
        for field, value in moe_kernels(capacity_factor=None).items():
            setattr(model.config, field, value)
    if model.config.vocab_size % tensor_parallelism:  # the embedding is cut: let NeMo pad the tokenizer's size
        model.config.vocab_size = None
    trainer.accelerator = accelerator
    if accelerator == "cpu":
        return fit_cpu(recipe)
    return adjust(recipe, recompute_moe_steps=RECOMPUTE_MOE_STEPS) if model.config.num_moe_experts else recipe


def fit_cpu(recipe: run.Partial) -> run.Partial:
    """Change a recipe in place so that it trains on a machine without a GPU, and return it."""
    config, trainer = recipe.model.config, recipe.trainer
    config.apply_rope_fusion = False  # a Transformer Engine kernel: if it is missing, the config cannot be built
    if config.num_moe_experts:
        config.moe_permute_fusion = False  # also a Transformer Engine kernel
        recompute_layers(config)  # weights and Adam's states leave a laptop little memory
    recipe.data.num_workers = 0
    trainer.log_every_n_steps = 1
    # An asynchronous save forks this process. The process then changes its memory, which doubles the use.
    trainer.strategy.ckpt_async_save = False
    in_float32_if_faster(trainer)
    return recipe
