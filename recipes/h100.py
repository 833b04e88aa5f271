"""What the recipes for H100 clusters share: the paper's training, the fast run, and the settings that all take.

How they differ from `performance_mode` of NeMo's own recipes, and why:

- NeMo's Mixtral sets EP1 TP8; experts cut by eight leave small matrices and an all-reduce in every layer. Here experts
  are spread (EP8) and never cut (expert-tensor parallelism 1): the paper's fastest row, and NeMo's own tuned row for
  Mixtral 8x7B on H100 in `scripts/performance`.
- NeMo's reduces gradients in bfloat16. Here they stay in float32: a run that starts from a trained model makes small
  steps (3e-5), and a sum over 512 sequences in 8 bits of mantissa loses what it is made of. There is room: the fast
  layout of Llama 3 8B holds about 21 GiB of model states on 64 GPUs (derived).
- Overlap of tensor-parallel communication stays off: experimental, and its tuned buffers are for other shapes.
- What is the same: capacity factor 1 with padding (`MegatronTokenDropCallback`'s values, set in the model's
  configuration, where an override finds them), manual garbage collection, overlap of pipeline and data-parallel
  communication.
"""

from typing import Any, Optional

import nemo_run as run
from nemo.collections.common.tokenizers.null_tokenizer import NullTokenizer
from nemo.collections.llm.recipes.precision import mixed_precision
from nemo.lightning.pytorch.callbacks import GarbageCollectionCallback
from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

from nemo_upcycle.errors import SpecError
from nemo_upcycle.recipes.common import checkpoints
from nemo_upcycle.spec import ROUTER_ORDERS, check_capacity
from nemo_upcycle.training.recompute import RecomputeFirstSteps


#: The paper gives tokens, not steps: 100B, at 512 sequences of 8192 a step (NeMo's batch for Llama 3).
MAX_STEPS = 23_842
#: Of Llama 3 and 3.1; the last id is the mock tokenizer's end of document.
VOCABULARY = 128_256
#: Megatron's names of Transformer Engine's FP8 recipes, and the NeMo precision of each.
FP8_RECIPES = {
    "delayed": mixed_precision.bf16_with_fp8_mixed,
    "tensorwise": mixed_precision.bf16_with_fp8_current_scaling_mixed,
    "blockwise": mixed_precision.bf16_with_fp8_subchannel_scaling_mixed,
}
DISPATCHERS = ("alltoall", "deepep")


def paper_training(recipe: run.Partial) -> run.Partial:
    """Set schedule, data and checkpoints of the paper's training in a NeMo recipe for Llama 3, in place.

    Stated: 100B tokens, learning rate 3e-5 to 3e-7, cosine, 100 steps of warm-up. Left as NeMo has them, for the paper
    does not say: batches of 512 x 8192 tokens (4.2M, what He et al., arXiv 2410.07524, found best), Adam (0.9, 0.95),
    weight decay 0.1, clipping at 1. The mock data has Llama's vocabulary, so that a run needs no file.
    """
    recipe.trainer.max_steps = MAX_STEPS
    recipe.trainer.plugins.grad_reduce_in_fp32 = True
    recipe.optim.config.lr = 3e-5
    recipe.optim.lr_scheduler.warmup_steps = 100
    recipe.optim.lr_scheduler.constant_steps = 0
    recipe.optim.lr_scheduler.min_lr = 3e-7
    recipe.data.tokenizer = run.Config(NullTokenizer, vocab_size=VOCABULARY - 1)
    recipe.log.ckpt = checkpoints(every_n_steps=1000)
    return recipe


def moe_kernels(capacity_factor: Optional[float]) -> dict[str, Any]:
    """Return the fields of a model config for experts on GPUs: grouped GEMM, fused permutation, the capacity."""
    return {
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_expert_capacity_factor": capacity_factor,
        "moe_pad_expert_input_to_capacity": False,
    }


def fast_run(recipe: run.Partial, tensor_parallelism: int, context_parallelism: int) -> run.Partial:
    """Turn a recipe into its fast run, in place: capacity factor 1 with padding, communication overlapped.

    Every expert computes exactly its capacity, so shapes are static, memory does not depend on the router, and
    nothing needs recomputation. What does not fit is dropped, so the model of step 0 is not quite the dense one.

    Args:
        recipe: of an upcycled model.
        tensor_parallelism: of the attention; above 1 with sequence parallelism.
        context_parallelism: sequences are cut by it.
    """
    recipe.trainer.callbacks = [
        *(recipe.trainer.callbacks or []),
        run.Config(GarbageCollectionCallback, gc_interval_train=100, gc_interval_val=100),
    ]
    return adjust(
        recipe,
        capacity_factor=1.0,
        pad_to_capacity=True,
        recompute_moe_steps=0,
        comm_overlap=True,
        tensor_parallelism=tensor_parallelism,
        context_parallelism=context_parallelism,
    )


def adjust(
    recipe: run.Partial,
    *,
    fp8_recipe: Optional[str] = None,
    capacity_factor: Optional[float] = None,
    pad_to_capacity: Optional[bool] = None,
    router_order: Optional[str] = None,
    scale_output: Optional[bool] = None,
    dispatcher: Optional[str] = None,
    recompute_moe_steps: Optional[int] = None,
    comm_overlap: Optional[bool] = None,
    tensor_parallelism: Optional[int] = None,
    pipeline_parallelism: Optional[int] = None,
    virtual_pipeline_parallelism: Optional[int] = None,
    context_parallelism: Optional[int] = None,
    expert_parallelism: Optional[int] = None,
    expert_tensor_parallelism: Optional[int] = None,
) -> run.Partial:
    """Change single settings of an upcycling recipe, in place. None leaves a setting as it stands.

    Args:
        recipe: of an upcycled model.
        fp8_recipe: `delayed`, `tensorwise` (current scaling) or `blockwise`.
        capacity_factor: token slots of an expert, over those of perfect balance; 0 drops nothing (dropless).
        pad_to_capacity: let every expert compute its whole capacity.
        router_order: `topk_softmax` (Mixtral type) or `softmax_topk` (ST type).
        scale_output: scale the experts' down projection where the router's order asks for it (`output_scale`).
        dispatcher: `alltoall` or `deepep`.
        recompute_moe_steps: recompute the MoE layers in so many first steps; 0 never.
        comm_overlap: overlap messages between pipeline stages, gradients and parameters with computation.
        tensor_parallelism: of the attention; above 1 with sequence parallelism.
        pipeline_parallelism: stages.
        virtual_pipeline_parallelism: chunks of each stage; 1 without interleaving.
        context_parallelism: sequences are cut by it.
        expert_parallelism: experts are spread over so many ranks.
        expert_tensor_parallelism: each expert is cut by it.

    Returns:
        The recipe.

    Raises:
        SpecError: a name is unknown, or settings contradict each other.
    """
    config, strategy = recipe.model.config, recipe.trainer.strategy
    if capacity_factor is not None:
        config.moe_expert_capacity_factor = capacity_factor or None
    if pad_to_capacity is not None:
        config.moe_pad_expert_input_to_capacity = pad_to_capacity
    if router_order is not None:
        if router_order not in ROUTER_ORDERS:
            raise SpecError.unknown("router_order", router_order, ROUTER_ORDERS)
        recipe.resume.restore_config.spec.router_order = router_order
        config.moe_router_pre_softmax = router_order == "softmax_topk"
    if scale_output is not None:
        recipe.resume.restore_config.spec.output_scale = "exact" if scale_output else "none"
    if dispatcher is not None:
        _dispatch(config, dispatcher)
    if recompute_moe_steps is not None:
        _recompute(recipe, recompute_moe_steps)
    if comm_overlap is not None:
        overlap = run.Config(MegatronCommOverlapCallback, tp_comm_overlap=False) if comm_overlap else None
        _replace_callback(recipe, MegatronCommOverlapCallback, overlap)
        strategy.ddp.overlap_grad_reduce = strategy.ddp.overlap_param_gather = comm_overlap
    sizes = {
        "tensor_model_parallel_size": tensor_parallelism,
        "pipeline_model_parallel_size": pipeline_parallelism,
        "context_parallel_size": context_parallelism,
        "expert_model_parallel_size": expert_parallelism,
        "expert_tensor_parallel_size": expert_tensor_parallelism,
    }
    for name, size in sizes.items():
        if size is not None:
            setattr(strategy, name, size)
    if tensor_parallelism is not None:
        strategy.sequence_parallel = tensor_parallelism > 1
    if virtual_pipeline_parallelism is not None:
        strategy.virtual_pipeline_model_parallel_size = (
            virtual_pipeline_parallelism if virtual_pipeline_parallelism > 1 else None
        )
    if fp8_recipe is not None:
        _compute_in_fp8(recipe, fp8_recipe)
    _check(config)
    return recipe


def _dispatch(config: run.Config, dispatcher: str) -> None:
    if dispatcher not in DISPATCHERS:
        raise SpecError.unknown("dispatcher", dispatcher, DISPATCHERS)
    is_deepep = dispatcher == "deepep"
    config.moe_token_dispatcher_type = "flex" if is_deepep else "alltoall"
    config.moe_enable_deepep = is_deepep
    if is_deepep:
        config.moe_router_dtype = "fp32"  # DeepEP sends weights in float32 only


def _recompute(recipe: run.Partial, steps: int) -> None:
    config = recipe.model.config
    config.recompute_granularity, config.recompute_modules = ("selective", ["moe"]) if steps else (None, None)
    callback = run.Config(RecomputeFirstSteps, steps=steps) if steps else None
    _replace_callback(recipe, RecomputeFirstSteps, callback)


def _replace_callback(recipe: run.Partial, kind: type, callback: Optional[run.Config]) -> None:
    others = [item for item in recipe.trainer.callbacks or [] if item.__fn_or_cls__ is not kind]
    recipe.trainer.callbacks = [*others, callback] if callback else others


def _compute_in_fp8(recipe: run.Partial, name: str) -> None:
    """Let Transformer Engine multiply in FP8; weights stay in bfloat16.

    Weights kept in FP8 (`fp8_param_gather`, on in two of NeMo's three precisions) are not for a run that starts by
    upcycling: it fills parameters through views, which such tensors do not have, and the float32 masters are taken
    from what was filled: they would keep 8 bits of the dense checkpoint.
    """
    name = {"current": "tensorwise"}.get(name, name)
    if name not in FP8_RECIPES:
        raise SpecError.unknown("fp8_recipe", name, [*FP8_RECIPES, "current"])
    recipe.trainer.plugins = FP8_RECIPES[name]()
    recipe.trainer.plugins.fp8_param_gather = False
    config = recipe.model.config
    # The precision sets these, too, but after the model's configuration has checked itself.
    config.fp8, config.fp8_recipe = "hybrid", name
    # FP8 multiplies tokens in groups of 16; an expert that is padded to its capacity has whole ones already.
    config.moe_router_padding_for_fp8 = not config.moe_pad_expert_input_to_capacity


def _check(config: run.Config) -> None:
    pad = config.moe_pad_expert_input_to_capacity
    check_capacity(config.moe_expert_capacity_factor, pad, config.num_moe_experts, config.moe_router_topk)
    if config.moe_pad_expert_input_to_capacity and config.moe_enable_deepep:
        raise SpecError(
            "dispatcher",
            got="deepep",
            expected="alltoall with pad_to_capacity",
            fix="set pad_to_capacity=False, or dispatcher='alltoall'",
        )
