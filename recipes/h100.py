"""What the recipes for H100 clusters share: the paper's training, the trainer, the fast run and the dense baseline.

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

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Optional

import lightning.pytorch as pl
import nemo_run as run
import torch
from lightning.pytorch.callbacks.callback import Callback
from nemo import lightning as nl
from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
from nemo.collections.llm.api import pretrain
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback

from nemo_upcycle.pipeline.nemo.pipeline import pipeline
from nemo_upcycle.recipes.common import checkpoints, start_from
from nemo_upcycle.recipes.h100_arguments import adjust, with_overrides
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers import paper
from nemo_upcycle.trainers.nemo.loss_guard import LossGuard
from nemo_upcycle.trainers.nemo.stopping import SaveOnSignal, StopOnSignal
from nemo_upcycle.trainers.nemo.watchers import hang_detection, straggler_report


#: Of eight H100.
NODES = 64
#: Of Llama 3 and 3.1, whose configurations do not name it; the last id is the mock tokenizer's end of document.
VOCABULARY = 128_256
#: The blend of a chain: the paper's, as far as it can be had.
DATA = "redpajama_v2_academic_7_3"
#: How long the fresh routers are given to find balance before activations of the MoE layers are kept.
RECOMPUTE_MOE_STEPS = 500
#: Checkpoints kept: the last one, and the one before it. A loss that went wrong is often seen only after the next
#: save, and a file that storage lost must not cost the run. More are a matter of room: one of an upcycled 8B model
#: takes 619 GiB, and while one is written there is one more. `log.ckpt.keep_every=5000` keeps some for good.
KEEP_LAST = 2


def moe_trainer(
    dense_trainer: Callable[..., run.Config[nl.Trainer]],
    *,
    tensor_parallelism: int,
    pipeline_parallelism: int,
    virtual_pipeline_parallelism: Optional[int],
    context_parallelism: int = 1,
) -> Callable[..., run.Config[nl.Trainer]]:
    """Make the `trainer` of an upcycling recipe: NeMo's for the dense model, with expert parallelism.

    Args:
        dense_trainer: `trainer` of NeMo's recipe for the dense model.
        tensor_parallelism: default of the argument, as are the others.
        pipeline_parallelism: stages.
        virtual_pipeline_parallelism: chunks of each stage.
        context_parallelism: ranks that share a sequence.
    """

    def trainer(
        tensor_parallelism: int = tensor_parallelism,
        pipeline_parallelism: int = pipeline_parallelism,
        virtual_pipeline_parallelism: Optional[int] = virtual_pipeline_parallelism,
        context_parallelism: int = context_parallelism,
        sequence_parallelism: bool = tensor_parallelism > 1,
        expert_parallelism: int = 8,
        num_nodes: int = NODES,
        num_gpus_per_node: int = 8,
        max_steps: int = paper.STEPS,
        callbacks: Optional[list[run.Config[Callback]]] = None,
    ) -> run.Config[nl.Trainer]:
        """Configure the NeMo Lightning Trainer; tensor parallelism does not cut the experts.

        Args:
            tensor_parallelism (int): Degree of tensor model parallelism.
            pipeline_parallelism (int): Degree of pipeline model parallelism.
            virtual_pipeline_parallelism (int | None): Size of virtual pipeline parallelism.
            context_parallelism (int): Degree of context parallelism.
            sequence_parallelism (bool): Whether to use sequence parallelism; MoE under tensor parallelism needs it.
            expert_parallelism (int): Degree of expert parallelism.
            num_nodes (int): Number of compute nodes to use.
            num_gpus_per_node (int): Number of GPUs per node.
            max_steps (int): Maximum number of training steps.
            callbacks (list[run.Config[Callback]] | None): List of callback configurations.

        Returns:
            run.Config[nl.Trainer]: Configuration for the NeMo Lightning Trainer.
        """
        config = dense_trainer(
            tensor_parallelism=tensor_parallelism,
            pipeline_parallelism=pipeline_parallelism,
            pipeline_parallelism_type=torch.bfloat16,
            virtual_pipeline_parallelism=virtual_pipeline_parallelism,
            context_parallelism=context_parallelism,
            sequence_parallelism=sequence_parallelism,
            num_nodes=num_nodes,
            num_gpus_per_node=num_gpus_per_node,
            max_steps=max_steps,
            callbacks=callbacks,
        )
        config.strategy.expert_model_parallel_size = expert_parallelism
        config.strategy.expert_tensor_parallel_size = 1
        return config

    return trainer


def paper_training(recipe: run.Partial) -> run.Partial:
    """Set schedule and data of the paper's training in a NeMo recipe for a dense model, in place.

    Stated: 100B tokens, learning rate 3e-5 to 3e-7, cosine, 100 steps of warm-up. Kept as NeMo has them, for the paper
    does not say: batches of 512 x 8192 tokens (4.2M, what He et al., arXiv 2410.07524, found best), Adam (0.9, 0.95),
    weight decay 0.1, clipping at 1. docs/schedules.md has what other upcyclings took. The mock data has the model's
    vocabulary and needs no file.
    """
    recipe.trainer.max_steps = paper.STEPS
    recipe.trainer.plugins.grad_reduce_in_fp32 = True
    recipe.optim.config.lr = paper.PEAK
    recipe.optim.lr_scheduler.warmup_steps = paper.WARMUP_STEPS
    recipe.optim.lr_scheduler.constant_steps = 0
    recipe.optim.lr_scheduler.min_lr = paper.END
    recipe.data.seq_length = recipe.model.config.seq_length
    recipe.data.global_batch_size = paper.TOKENS_A_STEP // recipe.data.seq_length
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
    name: str,
    nemo_recipe: ModuleType,
    model: Callable[[], run.Config[pl.LightningModule]],
    trainer: Callable[..., run.Config[nl.Trainer]],
    dense: str,
    spec: UpcycleSpec,
    fast: Callable[[run.Partial], run.Partial],
    *,
    num_nodes: int = NODES,
) -> Callable[..., run.Partial]:
    """Register the `pretrain_recipe` of an upcycled model: the paper's training, on H100s.

    Args:
        name: the recipe's.
        nemo_recipe: NeMo's recipe module of the dense model.
        model: makes the upcycled model.
        trainer: makes its trainer, for the recipe's nodes and callbacks.
        dense: the checkpoint to start from, by default.
        spec: how to upcycle.
        fast: turns the recipe into its fast run.
        num_nodes: nodes, by default.
    """

    @run.cli.factory(target=pretrain, name=name)
    @with_overrides
    def pretrain_recipe(
        dir: Optional[str] = None,
        name: str = name,
        num_nodes: int = num_nodes,
        num_gpus_per_node: int = 8,
        performance_mode: bool = False,
        dense: str = dense,
        data: Optional[str] = None,
        fn: Callable = pretrain,
    ) -> run.Partial:
        """Create a recipe that upcycles a dense model and trains on as arXiv 2412.09952 does.

        BF16, capacity factor 4, 100B tokens, learning rate 3e-5 -> 3e-7. Every argument below `data` changes one
        setting of the run; None keeps it. Each is an override, too.

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
                $ nemo llm pretrain --factory NAME --dryrun
                $ nemo llm pretrain --factory "NAME(dense='/models/dense', data='data/blend', num_nodes=16)" --yes
                $ nemo llm pretrain --factory "NAME(performance_mode=True, fp8_recipe='blockwise')" --yes
                $ nemo llm pretrain --factory NAME model.config.moe_expert_capacity_factor=2.0 --yes

            Python API usage:
                >>> recipe = pretrain_recipe(num_nodes=16)
        """
        recipe = nemo_recipe.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn)
        recipe.model = model()
        recipe = paper_training(recipe)
        callbacks = recipe.trainer.callbacks
        recipe.trainer = trainer(num_nodes=num_nodes, num_gpus_per_node=num_gpus_per_node, callbacks=callbacks)
        recipe = resilient(start_from(recipe, dense, spec, data))
        recipe = adjust(recipe, recompute_moe_steps=RECOMPUTE_MOE_STEPS, comm_overlap=True)
        return fast(recipe) if performance_mode else recipe

    return pretrain_recipe


def fast_run(recipe: run.Partial, tensor_parallelism: int, context_parallelism: int) -> run.Partial:
    """Turn a recipe into its fast run, in place: capacity factor 1 with padding, communication overlapped.

    Every expert computes exactly its capacity, so shapes are static, memory does not depend on the router, and
    nothing needs recomputation. Tokens beyond the capacity are dropped, so the model of step 0 is not quite the dense
    one. Gradients are reduced in bfloat16.

    Args:
        recipe: an upcycled model's.
        tensor_parallelism: parts that the attention is cut into; above 1 with sequence parallelism.
        context_parallelism: ranks that share a sequence.
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
        tensor_parallelism=tensor_parallelism,
        context_parallelism=context_parallelism,
    )


def chain(
    name: str, recipe: Callable[..., run.Partial], baseline: Callable[..., run.Partial]
) -> Callable[..., run.Partial]:
    """Register the `pipeline_recipe` of an upcycled model: the chain from import to report.

    Args:
        name: the recipe's.
        recipe: its `pretrain_recipe`.
        baseline: `pretrain_recipe` of the dense baseline.
    """
    parent, nodes = (inspect.signature(recipe).parameters[argument].default for argument in ("dense", "num_nodes"))

    @run.cli.factory(target=pipeline, name=name)
    def pipeline_recipe(
        dir: str = f"runs/{name}",
        num_nodes: int = nodes,
        num_gpus_per_node: int = 8,
        performance_mode: bool = False,
        dense: str = parent,
        data: str = DATA,
    ) -> run.Partial:
        """Create the whole chain: import, data, upcycle, pretrain, dense baseline, export, evaluate, report.

        Args:
            dir (str): Folder of the run.
            num_nodes (int): Number of compute nodes of the two trainings.
            num_gpus_per_node (int): Number of GPUs per node.
            performance_mode (bool): The fast runs of both.
            dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
            data (str): A blend, or a finished folder of `nemo-upcycle data`.

        Returns:
            run.Partial: Partial configuration of the pipeline.

        Examples:
            CLI usage:
                $ nemo upcycle pipeline --factory NAME dense=/models/dense data=/data/blend dir=runs/first --until data
                $ python cluster.py --factory NAME dir=runs/first run.executor=my_cluster --yes
        """
        sizes = {"num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "performance_mode": performance_mode}
        return run.Partial(
            pipeline,
            dir=dir,
            dense=dense,
            pretrain=recipe(dense=dense, **sizes),
            dense_ct=baseline(dense=dense, **sizes),
            data=data,
            evaluation="paper",
        )

    return pipeline_recipe


def dense_baseline(
    name: str,
    nemo_recipe: ModuleType,
    dense: str,
    model: Optional[Callable[[], run.Config]] = None,
    *,
    layout: Optional[dict[str, int]] = None,
    num_nodes: int = NODES,
) -> Callable[..., run.Partial]:
    """Register the `pretrain_recipe` of a dense baseline: the dense model, trained as the upcycled one is.

    Args:
        name: the recipe's.
        nemo_recipe: NeMo's recipe module, whose layout is kept.
        dense: the checkpoint to start from, by default.
        model: the dense model, where it is not the module's.
        layout: Megatron's settings of it that are to differ.
        num_nodes: nodes, by default.
    """

    @run.cli.factory(target=pretrain, name=name)
    def pretrain_recipe(
        dir: Optional[str] = None,
        name: str = name,
        num_nodes: int = num_nodes,
        num_gpus_per_node: int = 8,
        performance_mode: bool = False,
        dense: str = dense,
        data: Optional[str] = None,
        fn: Callable = pretrain,
    ) -> run.Partial:
        """Create a recipe that trains a dense model on, with data, batches and schedule of the upcycled run.

        Args:
            dir (str | None): Directory for saving logs and checkpoints.
            name (str): Name of the run.
            num_nodes (int): Number of compute nodes to use.
            num_gpus_per_node (int): Number of GPUs per node.
            performance_mode (bool): NeMo's own optimizations of this model.
            dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
            data (str | None): A finished folder of `nemo-upcycle data`; None: NeMo's mock data, random tokens.
            fn (Callable): The pretraining function to use.

        Returns:
            run.Partial: Partial configuration for pretraining.

        Examples:
            CLI usage:
                $ nemo llm pretrain --factory NAME --dryrun
                $ nemo llm pretrain --factory "NAME(dense='/models/dense', data='data/blend')" --yes
        """
        recipe = nemo_recipe.pretrain_recipe(dir, name, num_nodes, num_gpus_per_node, fn=fn)
        if model is not None:
            recipe.model = model()
        recipe = paper_training(recipe)
        if performance_mode:  # not an argument of all of NeMo's recipes
            recipe = nemo_recipe.pretrain_performance_optimizations(recipe)
        for setting, size in (layout or {}).items():
            setattr(recipe.trainer.strategy, setting, size)
        return resilient(start_from(recipe, dense, None, data))

    return pretrain_recipe
