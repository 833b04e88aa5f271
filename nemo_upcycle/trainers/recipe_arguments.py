"""The settings that every upcycling recipe takes as arguments, defined once in `adjust`.

`with_overrides` adds these arguments to the signature and the docstring of a recipe in `recipes/`, because NeMo-Run
parses the command line by the signature, and users read the docstring. Importing this module or a recipe's file
imports no trainer.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Optional

from nemo_upcycle.errors import SpecError
from nemo_upcycle.spec import ROUTER_KINDS
from nemo_upcycle.utils.validation import check_capacity


#: The dispatchers of NeMo 2.7. The planner knows later dispatchers as well.
DISPATCHERS = ("alltoall", "deepep")
#: Maps Megatron's name of a Transformer Engine FP8 recipe to NeMo's precision.
FP8_RECIPES = {
    "delayed": "bf16_with_fp8_mixed",
    "tensorwise": "bf16_with_fp8_current_scaling_mixed",
    "blockwise": "bf16_with_fp8_subchannel_scaling_mixed",
}


def moe_kernels(capacity_factor: Optional[float]) -> dict[str, Any]:
    """Return the fields of a model config for experts on GPUs: grouped GEMM, fused permutation, the capacity."""
    return {
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_expert_capacity_factor": capacity_factor,
        "moe_pad_expert_input_to_capacity": False,
    }


def adjust(
    recipe: Any,
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
) -> Any:
    """Change single settings of an upcycling recipe, in place. None leaves a setting unchanged.

    Args:
        recipe (run.Partial): Recipe of an upcycled model.
        fp8_recipe (str | None): Compute in FP8: `delayed`, `tensorwise` (current scaling) or `blockwise`.
        capacity_factor (float | None): Token slots of an expert as a multiple of its balanced share; 0 drops nothing.
        pad_to_capacity (bool | None): Pad the tokens of every expert to its whole capacity.
        router_order (str | None): `topk_softmax` (Mixtral type) or `softmax_topk` (ST type).
        scale_output (bool | None): Scale the experts' down projection if the router's order needs it.
        dispatcher (str | None): `alltoall` or `deepep`.
        recompute_moe_steps (int | None): Number of first steps in which MoE layers are recomputed; 0 for none.
        comm_overlap (bool | None): Overlap pipeline and data-parallel communication with computation.
        tensor_parallelism (int | None): Degree of tensor model parallelism; above 1, sequence parallelism is on.
        pipeline_parallelism (int | None): Degree of pipeline model parallelism.
        virtual_pipeline_parallelism (int | None): Size of virtual pipeline parallelism; 1 turns it off.
        context_parallelism (int | None): Degree of context parallelism.
        expert_parallelism (int | None): Degree of expert parallelism.
        expert_tensor_parallelism (int | None): Degree of tensor parallelism of the experts.

    Returns:
        run.Partial: The recipe.

    Raises:
        SpecError: a name is unknown, or settings contradict each other.
    """
    import nemo_run as run
    from nemo.lightning.pytorch.callbacks.megatron_comm_overlap import MegatronCommOverlapCallback

    from nemo_upcycle.trainers.nemo.recompute import RecomputeFirstSteps

    config, strategy = recipe.model.config, recipe.trainer.strategy
    if capacity_factor is not None:
        config.moe_expert_capacity_factor = capacity_factor or None
    if pad_to_capacity is not None:
        config.moe_pad_expert_input_to_capacity = pad_to_capacity
    if router_order is not None:
        spec = recipe.resume.restore_config.spec
        kinds = {order: kind for (score, order), kind in ROUTER_KINDS.items() if score == spec.router_score}
        if router_order not in kinds:
            raise SpecError.unknown("router_order", router_order, kinds)
        spec.router_order = router_order
        config.moe_router_pre_softmax = kinds[router_order].pre_softmax
    if scale_output is not None:
        recipe.resume.restore_config.spec.output_scale = "exact" if scale_output else "none"
    if dispatcher is not None:
        _dispatch(config, dispatcher)
    if recompute_moe_steps is not None:
        granularity, modules = ("selective", ["moe"]) if recompute_moe_steps else (None, None)
        config.recompute_granularity, config.recompute_modules = granularity, modules
        callback = run.Config(RecomputeFirstSteps, steps=recompute_moe_steps) if recompute_moe_steps else None
        _replace_callback(recipe, RecomputeFirstSteps, callback)
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
        chunks = virtual_pipeline_parallelism if virtual_pipeline_parallelism > 1 else None
        strategy.virtual_pipeline_model_parallel_size = chunks
    if fp8_recipe is not None:
        _compute_in_fp8(recipe, fp8_recipe)
    _check(config)
    return recipe


#: Help texts of a recipe's own arguments, in the form of NeMo's docstrings. `adjust` describes the other arguments.
_MEANINGS = {
    "dir": "(str | None): Directory for saving logs and checkpoints.",
    "name": "(str): Name of the run.",
    "num_nodes": "(int): Number of compute nodes to use.",
    "num_gpus_per_node": "(int): Number of GPUs (without CUDA: processes) per node.",
    "performance_mode": "(bool): The fast run: capacity factor 1 with padding, of a dense model NeMo's optimizations.",
    "expert_parallelism": "(int | None): Degree of expert parallelism; None: the recipe's own.",
    "dense": "(str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.",
    "data": "(str | None): A finished folder of `nemo-upcycle data`; None: data for trying.",
    "start": "(str | None): A checkpoint of a training of this model to start from, in place of the dense one.",
    "peft_scheme": "(str | None): lora: train adapters and routers; none: all weights.",
    "fn": "(Callable | None): The function that trains; None: NeMo's own.",
}
_TUNING = {"data": "(str | None): A finished folder of `nemo-upcycle chat`; None: the demo's conversations."}


def with_help(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """Add arguments, return value and commands to the docstring of a NeMo recipe, and return the recipe.

    Args:
        recipe: function from a file in `recipes/`; the default of its argument `name` is the recipe's name on the
            command line.
    """
    parameters, tunes = inspect.signature(recipe).parameters, "start" in inspect.signature(recipe).parameters
    known = _overrides_help() | _MEANINGS | (_TUNING if tunes else {})
    verb, name = "finetune" if tunes else "pretrain", parameters["name"].default
    lines = [inspect.getdoc(recipe) or "", "", "Args:"]
    lines += [f"    {argument} {known[argument]}" for argument in parameters]
    lines += ["", "Returns:", "    run.Partial: Configuration of the training.", "", "Examples:", "    CLI usage:"]
    lines += [
        f"        $ nemo llm {verb} --factory {name} --dryrun",
        f"        $ nemo llm {verb} --factory \"{name}(dense='/models/dense', data='data/mine')\" --yes",
    ]
    recipe.__doc__ = "\n".join(lines)
    return recipe


def _overrides_help() -> dict[str, str]:
    """Return the help line of each argument of `adjust`."""
    lines = (inspect.getdoc(adjust) or "").partition("Args:\n")[2].partition("\n\n")[0].splitlines()
    found = (line.strip().partition(" ") for line in lines)
    return {argument: meaning for argument, _, meaning in found}


def with_overrides(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """Give a recipe the arguments of `adjust` before its last argument, apply them to its result, and add its help.

    Args:
        recipe: function from a file in `recipes/` that makes the training of an upcycled model; its last argument is
            `fn`.

    Returns:
        The function to call and to register.

    Example:
        >>> @with_overrides  # doctest: +SKIP
        ... def e8t2(dir=None, name="llama3_8b_e8t2", num_nodes=64, ..., fn=None): ...
    """
    own = inspect.signature(recipe)
    *first, last = own.parameters.values()
    overrides = list(inspect.signature(adjust).parameters.values())[1:]
    added = [one.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for one in overrides]
    signature = own.replace(parameters=[*first, *added, last])

    @functools.wraps(recipe)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        changes = {one.name: given.pop(one.name, None) for one in added}
        return adjust(recipe(**given), **changes)

    annotations = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    wrapped.__annotations__ = annotations | {"return": signature.return_annotation}
    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    return with_help(wrapped)


def _dispatch(config: Any, dispatcher: str) -> None:
    if dispatcher not in DISPATCHERS:
        raise SpecError.unknown("dispatcher", dispatcher, DISPATCHERS)
    is_deepep = dispatcher == "deepep"
    config.moe_token_dispatcher_type = "flex" if is_deepep else "alltoall"
    config.moe_enable_deepep = is_deepep
    if is_deepep:
        config.moe_router_dtype = "fp32"  # DeepEP sends weights in float32 only


def _replace_callback(recipe: Any, kind: type, callback: Any) -> None:
    kept = [item for item in recipe.trainer.callbacks or [] if item.__fn_or_cls__ is not kind]
    recipe.trainer.callbacks = [*kept, callback] if callback else kept


def _compute_in_fp8(recipe: Any, name: str) -> None:
    """Let Transformer Engine multiply in FP8, and keep the weights in bfloat16.

    Two of NeMo's three FP8 precisions can keep the weights in FP8, too (`trainer.plugins.fp8_param_gather=True`). Such
    weights are filled as well, but this has not been tried on a GPU yet.
    """
    from nemo.collections.llm.recipes.precision import mixed_precision

    name = {"current": "tensorwise"}.get(name, name)
    if name not in FP8_RECIPES:
        raise SpecError.unknown("fp8_recipe", name, [*FP8_RECIPES, "current"])
    in_fp32 = recipe.trainer.plugins.grad_reduce_in_fp32
    recipe.trainer.plugins = getattr(mixed_precision, FP8_RECIPES[name])()
    recipe.trainer.plugins.fp8_param_gather, recipe.trainer.plugins.grad_reduce_in_fp32 = False, in_fp32
    config = recipe.model.config
    # The precision plugin sets these fields, too, but only after the model's configuration has checked itself.
    config.fp8, config.fp8_recipe = "hybrid", name
    # FP8 multiplies tokens in groups of 16. An expert that is padded to its capacity already has whole groups.
    config.moe_router_padding_for_fp8 = not config.moe_pad_expert_input_to_capacity


def _check(config: Any) -> None:
    pad = config.moe_pad_expert_input_to_capacity
    check_capacity(config.moe_expert_capacity_factor, pad, config.num_moe_experts, config.moe_router_topk)
    if pad and config.moe_enable_deepep:
        raise SpecError(
            "dispatcher",
            kind="refused",
            got="deepep cannot pad experts to their capacity",
            fix="set pad_to_capacity=False, or dispatcher='alltoall'",
        )
