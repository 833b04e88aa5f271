"""Convert the options of `nemo-upcycle plan` to a request: model, workload and GPUs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import check_parent
from nemo_upcycle.models.growth import growth_spec
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.rotary import rope_kind
from nemo_upcycle.planning import hardware
from nemo_upcycle.planning.recipe_table import KnownRecipe
from nemo_upcycle.planning.search import MOST_GPUS, PlanRequest
from nemo_upcycle.planning.workload import FORCED_IMBALANCE, USUAL_IMBALANCE, Workload
from nemo_upcycle.recipes import known_recipe, recipe_for
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.backends import BACKENDS
from nemo_upcycle.utils.validation import check_capacity, check_number, check_whole


#: Defaults for a model without a recipe. The gradients' dtype is the same as in NVIDIA's recipes.
_DEFAULTS = {
    "seq_length": 8192,
    "global_batch": 512,
    "capacity_factor": None,
    "tokens": 100e9,
    "gradients": "bf16",
}


@dataclass(frozen=True)
class Subject:
    """The model to plan for, its dense parent, and the recipe that trains the model, if any.

    If `folder` is set, the model was read from this folder, and the recipe was found by the model's shapes.
    """

    arch: Architecture
    dense: Architecture
    spec: UpcycleSpec | None
    recipe: KnownRecipe | None
    defaults: dict[str, Any]
    folder: Path | None = None


def subject_of(args: argparse.Namespace) -> Subject:
    """Return the model that the command line names.

    Raises:
        UpcycleError: this package cannot train the model.
    """
    if args.recipe is not None:
        of_a_model = {"--experts": args.num_experts, "--top-k": args.top_k, "--granularity": args.granularity}
        _refuse(of_a_model, "cannot be combined with --recipe", "use --model FOLDER --experts N --top-k K")
        known = known_recipe(args.recipe)
        return Subject(known.arch, known.dense, known.spec, known, _DEFAULTS | known.defaults)
    folder, arch = _model_of(args.model)
    arch.require_trained()
    rope_kind(arch)  # refuse a rotary embedding that training refuses too
    if args.num_experts is None:
        _refuse({"--top-k": args.top_k, "--granularity": args.granularity}, "needs --experts", "add --experts 8")
        return Subject(arch, arch, None, recipe_for(arch, arch), _DEFAULTS, folder)
    if arch.num_experts:
        check_parent(arch, "--experts")
        why = "cannot be used with a parent that has experts, because they are copied whole"
        _refuse({"--granularity": args.granularity}, why, "omit {}")
        spec = growth_spec(arch, args.num_experts, args.top_k)
        return Subject(arch.upcycled(spec), arch, spec, None, _DEFAULTS, folder)
    given = {name: getattr(args, name) for name in ("top_k", "granularity") if getattr(args, name) is not None}
    # Both router orders cost the same. If top_k is 1, only softmax_topk is accepted.
    order = "softmax_topk" if args.top_k == 1 else "topk_softmax"
    spec = UpcycleSpec(num_experts=args.num_experts, router_order=order, **given)
    moe_arch = arch.upcycled(spec)
    return Subject(moe_arch, arch, spec, recipe_for(arch, moe_arch), _DEFAULTS, folder)


def _model_of(source: str) -> tuple[Path, Architecture]:
    """Return the folder and the architecture of a model (found as in `convert`) or of a checkpoint.

    Raises:
        UpcycleError: the model cannot be reached, or its architecture is unknown.
    """
    from nemo_upcycle.sources.fetch import configuration_folder

    folder = configuration_folder(source, nemo=True)
    if (folder / "config.json").is_file():
        return folder, read_architecture(folder)
    from nemo_upcycle.sources.megatron_checkpoint import is_megatron, read_megatron_architecture  # imports torch

    return folder, (read_megatron_architecture if is_megatron(folder) else read_architecture)(folder)


def request_of(args: argparse.Namespace, subject: Subject) -> PlanRequest:
    """Make the planner's request from the command line.

    Raises:
        SpecError: a value is wrong.
    """

    def given(name: str) -> Any:
        value = getattr(args, name)
        return subject.defaults[name] if value is None else value

    check_whole("gpus", args.gpus, 1, MOST_GPUS)
    check_whole("rows", args.rows, 1)
    if args.price_per_gpu_hour is not None:
        check_number("price_per_gpu_hour", args.price_per_gpu_hour, 0)
    _require_taken(args, subject)
    capacity = given("capacity_factor") or None
    if subject.arch.num_experts:
        check_capacity(capacity, args.pad_to_capacity, subject.arch.num_experts, subject.arch.top_k or 1)
    imbalance = FORCED_IMBALANCE if args.routing == "balanced" else USUAL_IMBALANCE
    low_params = args.low_params
    if low_params is None:  # this package's recipes keep BF16
        low_params = args.precision != "bf16" and subject.recipe is None and subject.spec is None
    gradients = given("gradients")
    if args.gradients is None and subject.recipe is not None:
        gradients = BACKENDS[args.backend].gradients or gradients  # the dtype that the printed command will use
    work = Workload(
        seq_length=given("seq_length"),
        global_batch=given("global_batch"),
        capacity_factor=capacity if subject.arch.num_experts else None,
        pad=args.pad_to_capacity,
        imbalance=args.imbalance if args.imbalance is not None else imbalance,
        precision=args.precision,
        low_params=low_params,
        gradients=gradients,
        dispatcher=args.dispatcher or "alltoall",
        routing=args.routing or "balanced",
        overlap=tuple(args.overlap.split(",")) if args.overlap else (),
        lora=subject.defaults.get("lora", 0),
    )
    if args.micro_batch is not None:
        check_whole("micro_batch", args.micro_batch, 1, work.global_batch, "global_batch")
    return PlanRequest(
        arch=subject.arch,
        gpu=hardware.known_gpu(args.gpu),
        gpus=args.gpus,
        work=work,
        tokens=given("tokens"),
        software=_software(args),
        usual=tuple(name for name in ("dispatcher", "overlap") if not args.recipe and getattr(args, name) is None),
        grouped=_is_grouped(subject),
        micro_batch=1 if args.micro_batch is None and subject.recipe and subject.recipe.tunes else args.micro_batch,
        recompute=args.recompute or None,
        price_per_gpu_hour=args.price_per_gpu_hour,
    )


def _software(args: argparse.Namespace) -> str:
    """Return the back end's Megatron-Core generation, or Megatron-Bridge's if --model is planned on Blackwell."""
    is_new = args.recipe is None and hardware.known_gpu(args.gpu).is_blackwell
    return hardware.BRIDGE_SOFTWARE if is_new else BACKENDS[args.backend].software


def _is_grouped(subject: Subject) -> bool:
    """Return whether the experts use grouped GEMM, as in all recipes except the laptop recipes."""
    return subject.recipe is None or subject.recipe.h100


def _require_taken(args: argparse.Namespace, subject: Subject) -> None:
    """Refuse options that would have no effect.

    Raises:
        SpecError: an option would have no effect.
    """
    overlap, recompute = ((text or "").split(",") for text in (args.overlap, args.recompute))
    of_experts = {
        "--capacity-factor": args.capacity_factor,
        "--pad-to-capacity": args.pad_to_capacity or None,
        "--dispatcher": None if args.dispatcher == "alltoall" else args.dispatcher,
        "--overlap": "ep" if "ep" in overlap else None,
        "--recompute": args.recompute if {"layernorm", "moe_act", "moe"} & {*recompute} else None,
    }
    if args.low_params and args.precision == "bf16":
        _refuse({"--low-precision-params": True}, "needs --precision in FP8 or FP4", "add --precision fp8-current")
    if not subject.arch.num_experts:
        refused, why = of_experts, "cannot be used with a dense model"
    elif args.recipe is not None and args.overlap:
        refused = {"--overlap": args.overlap}
        why = "cannot be combined with --recipe, because no recipe overlaps communication"
    elif not _is_grouped(subject):
        refused = {"--dispatcher": of_experts["--dispatcher"]}
        refused["--recompute"] = args.recompute if "moe_act" in recompute else None
        why = "cannot be used with this recipe, because the recipe does not use grouped GEMM"
    else:
        return
    _refuse(refused, why, "omit {}, or use --model FOLDER")


def _refuse(options: dict[str, Any], reason: str, fix: str) -> None:
    """Raise an error for the first given option; `{}` in the fix stands for the option's name."""
    for name, value in options.items():
        if value is not None:
            typed = name if value is True else f"{name} {value}"
            raise SpecError(typed, kind="refused", got=reason, fix=fix.format(name))
