"""`nemo-upcycle plan`: what fits, with which layout, how fast, how long, at what cost."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.cli.common import show
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.rotary import rope_kind
from nemo_upcycle.planning import hardware, table
from nemo_upcycle.planning.commands import BACKENDS, bridge_command, nemo_command, why_no_command
from nemo_upcycle.planning.layout import SIZES, parse_layout
from nemo_upcycle.planning.parameters import StagePlan
from nemo_upcycle.planning.search import (
    MOST_GPUS,
    Plan,
    PlanRequest,
    evaluate_layout,
    find,
    nearest_gpus,
    search,
    single_changes,
)
from nemo_upcycle.planning.workload import (
    DISPATCHERS,
    FORCED_IMBALANCE,
    GRADIENTS,
    PRECISIONS,
    RECOMPUTES,
    ROUTINGS,
    USUAL_IMBALANCE,
    Workload,
)
from nemo_upcycle.spec import UpcycleSpec, check_capacity
from nemo_upcycle.utils.validation import check_number, check_whole


EPILOG = """examples:
  nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 128
  nemo-upcycle plan --model /models/Llama-3-8B --experts 8 --top-k 2 --gpus 64 --tokens 27B --price-per-gpu-hour 2.5
  nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 512 --layout tp=2,pp=4,vp=8,cp=1,ep=8,etp=1 --explain 1 --check

keys of --layout (what is omitted is 1): tp tensor, cp context, ep expert, etp expert tensor parallelism; pp pipeline
  stages, vp virtual stages of each; mbs sequences of a micro-batch; dp data parallelism, which follows from the rest;
  first, last: layers of the first and the last stage; embedding=1, loss=1: count as a layer when layers are dealt out

exit status: 0 a layout fits (or is tight); 1 none does; 2 a value is wrong.
TFLOP/s and MFU count full attention, as arXiv 2412.09952 does; --json has the causal half beside it."""
#: Of a model without a recipe. Gradients are those of NVIDIA's recipes.
_DEFAULTS = {
    "seq_length": 8192,
    "global_batch": 512,
    "capacity_factor": None,
    "tokens": 100e9,
    "gradients": "bf16",
}
#: Of speed; differences below it are within the error of the predictions (docs/planning.md).
_LEAST_PERCENT = 5
_UNITS = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Subject:
    """The model to plan for, its dense parent, and the recipe that trains it, if any.

    With `folder`, the model is that folder's, and the recipe was found by its shapes.
    """

    arch: Architecture
    dense: Architecture
    spec: UpcycleSpec | None
    recipe: hardware.KnownRecipe | None
    defaults: dict[str, Any]
    folder: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_argument_group("what to train").add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help="a recipe of this package, with its batch, sequence and tokens")
    text = "dense or MoE: a Hugging Face folder or its config.json, hf://ORG/NAME on the hub, asset://smollm2-135m"
    what.add_argument("--model", metavar="MODEL", help=text)
    model = parser.add_argument_group("model and step")
    model.add_argument("--experts", dest="num_experts", type=int, metavar="N", help="upcycle --model to N experts")
    model.add_argument("--top-k", type=int, metavar="K", help="experts that a token passes through (default: 2)")
    model.add_argument("--granularity", type=int, metavar="G", help="parts of a dense network (default: 1)")
    model.add_argument("--seq-length", type=int, metavar="TOKENS", help="tokens of a sequence (default: 8192)")
    model.add_argument("--global-batch", type=int, metavar="SEQUENCES", help="sequences of a step (default: 512)")
    model.add_argument("--capacity-factor", type=float, metavar="CF", help="of the experts; 0 drops nothing")
    model.add_argument("--pad-to-capacity", action="store_true", help="pad every expert up to its capacity")
    model.add_argument(
        "--imbalance",
        type=float,
        metavar="X",
        help="busiest over mean expert rank (1.5; 1.11 with --routing balanced)",
    )
    text = f"{', '.join(PRECISIONS)}; the last two on Blackwell (default: bf16)"
    model.add_argument("--precision", default="bf16", metavar="NAME", help=text)
    text = (
        "keep parameters in FP8 or FP4 (default: for --model without --experts that no recipe trains, as NVIDIA does)"
    )
    switch = argparse.BooleanOptionalAction
    model.add_argument("--low-precision-params", dest="low_params", action=switch, help=text)
    text = f"{', '.join(GRADIENTS)}: what gradients are summed in (default: the recipe's; for --model bf16)"
    model.add_argument("--grad-dtype", dest="gradients", metavar="NAME", help=text)
    text = "(default: the recipe's alltoall; hybridep for --model on Blackwell)"
    model.add_argument("--dispatcher", metavar="NAME", help=f"{', '.join(DISPATCHERS)} {text}")
    model.add_argument("--routing", metavar="NAME", help=f"{', '.join(ROUTINGS)} (balanced)")
    text = "what runs beside computation; the recipes have none, --model what NVIDIA's recipes have for the layout"
    model.add_argument("--overlap", metavar="tp,ep,launch", help=text)
    model.add_argument(
        "--tokens", type=number_of_tokens, metavar="N", help="tokens of the run: 100B, 27e9 (default: 100B)"
    )
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    cluster.add_argument(
        "--gpu", default="h100", metavar="NAME", help=f"{', '.join(hardware.gpu_names())} (default: h100)"
    )
    text = f"{', '.join(hardware.SOFTWARE)}, or NVIDIA's container, 26.02 (default: the back end's)"
    cluster.add_argument("--software", metavar="NAME", help=text)
    cluster.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE", help="in your currency")
    layout = parser.add_argument_group("layout")
    layout.add_argument("--layout", metavar="tp=2,pp=4,...", help="evaluate this one; its keys are listed below")
    layout.add_argument("--micro-batch", type=int, metavar="N", help="sequences of a micro-batch (default: searched)")
    text = f"{', '.join(RECOMPUTES)}, or several modules: layernorm,moe_act"
    layout.add_argument("--recompute", metavar="KIND", help=f"{text} (default: the fastest that fits)")
    layout.add_argument("--rows", type=int, default=10, metavar="N", help="layouts to show (default: 10)")
    output = parser.add_argument_group("output")
    output.add_argument("--explain", type=int, metavar="ROW", help="show the arithmetic of a row")
    output.add_argument("--rank", metavar="R", help="parameters of rank R (a number, 1,2,3 or all) in the first row")
    output.add_argument("--check", action="store_true", help="compare the first row with Megatron's own modules")
    output.add_argument("--columns", metavar="GiB,MFU,...", help="columns of the table (default: what has room)")
    output.add_argument("--wide", action="store_true", help="all columns, however wide the terminal")
    output.add_argument(
        "--backend", default="nemo", metavar="NAME", help="whose command: nemo or bridge (default: nemo)"
    )


def run(args: argparse.Namespace) -> int:
    """Plan, print, and return the exit status.

    Raises:
        UpcycleError: a value is wrong.
    """
    names = table.named_columns(args.columns) if args.columns is not None else None
    if args.backend not in BACKENDS:
        raise SpecError.unknown("backend", args.backend, BACKENDS)
    subject = subject_of(args)
    request = request_of(args, subject)
    try:
        if args.layout is None:
            plans = search(request, args.rows)
        else:
            plans = [evaluate_layout(request, parse_layout(args.layout, args.gpus, args.micro_batch))]
    except SpecError as error:
        raise error.renamed(lambda name: _size_name(name, args.micro_batch)) from None
    ranks = _ranks(args.rank, plans[0]) if args.rank is not None else None
    if args.explain is not None:
        check_whole("explain", args.explain, 1, len(plans))
    rows = [table.row_values(plan, *_command(args, subject, plan)) for plan in plans]
    arch, length = request.arch, request.work.seq_length
    flops = {name: flops_per_token(arch, length, causal=name == "causal") for name in ("full", "causal")}
    model = {"total_params": arch.total_params, "active_params": arch.active_params, "flops_per_token": flops}
    answer: dict[str, Any] = {"model": model, "rows": rows, "warnings": _warnings(subject, request)}
    answer["faster_by_one_change"] = _faster(args, subject, plans[(args.explain or 1) - 1])
    answer |= {"ranks": ranks} if ranks is not None else {}
    answer |= {"check": _check(subject, plans[0])} if args.check else {}
    show(args, answer, "" if args.json else _text(args, subject, plans, answer, names))
    return 1 if all(plan.verdict == "no" for plan in plans) else 0


def number_of_tokens(text: str) -> float:
    """Return the number that a text such as `100B`, `1.5T`, `27e9` or `27,000,000,000` stands for.

    Raises:
        SpecError: it stands for none.
    """
    unit = _UNITS.get(text[-1:].upper())
    number = text[:-1] if unit else text
    if re.fullmatch(r"\d{1,3}(,\d{3})+", number):
        number = number.replace(",", "")
    try:
        value = float(number) * (unit or 1)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise SpecError(
            "--tokens", got=repr(text), expected="a number: 100B, 1.5T, 500M or 1e11", fix="set --tokens 100B"
        )
    return value


def subject_of(args: argparse.Namespace) -> Subject:
    """Return the model that the command line names.

    Raises:
        UpcycleError: it is none that this package trains.
    """
    if args.recipe is not None:
        of_a_model = {"--experts": args.num_experts, "--top-k": args.top_k, "--granularity": args.granularity}
        _refuse(of_a_model, "none beside --recipe", "use --model FOLDER --experts N --top-k K")
        known = hardware.known_recipe(args.recipe)
        return Subject(known.arch, known.dense, known.spec, known, _DEFAULTS | known.defaults)
    from nemo_upcycle.data.parents import configuration_folder

    folder = configuration_folder(args.model)
    arch = read_architecture(folder)
    rope_kind(arch)  # training refuses another kind, too
    if args.num_experts is None:
        _refuse({"--top-k": args.top_k, "--granularity": args.granularity}, "--experts beside it", "add --experts 8")
        return Subject(arch, arch, None, hardware.recipe_for(arch, arch), _DEFAULTS, folder)
    if arch.num_experts:
        raise SpecError(
            "--experts",
            got=args.num_experts,
            expected="a dense model",
            fix="omit --experts: an MoE model is planned as it is",
        )
    given = {name: getattr(args, name) for name in ("top_k", "granularity") if getattr(args, name) is not None}
    order = "softmax_topk" if args.top_k == 1 else "topk_softmax"  # the other would be refused, and costs the same
    spec = UpcycleSpec(num_experts=args.num_experts, router_order=order, **given)
    moe_arch = arch.upcycled(spec)
    return Subject(moe_arch, arch, spec, hardware.recipe_for(arch, moe_arch), _DEFAULTS, folder)


def request_of(args: argparse.Namespace, subject: Subject) -> PlanRequest:
    """Return what is to be planned for.

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
    if low_params is None:  # an upcycled model's cannot be filled, and this package's recipes keep BF16
        low_params = args.precision != "bf16" and subject.recipe is None and subject.spec is None
    gradients = given("gradients")
    if args.gradients is None and args.backend == "bridge" and subject.recipe is not None:
        gradients = "fp32"  # what the command has
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
        micro_batch=args.micro_batch,
        recompute=args.recompute or None,
        price_per_gpu_hour=args.price_per_gpu_hour,
    )


def _software(args: argparse.Namespace) -> str:
    """Return the generation of Megatron-Core: the named one, else that of the back end; Blackwell has Bridge's."""
    if args.software is not None:
        return hardware.known_software(args.software)
    is_new = args.backend == "bridge" or (args.recipe is None and hardware.known_gpu(args.gpu).is_blackwell)
    return hardware.BRIDGE_SOFTWARE if is_new else hardware.DEFAULT_SOFTWARE


def _is_grouped(subject: Subject) -> bool:
    """Return whether the experts' products are grouped: in all recipes but those for a laptop."""
    return subject.recipe is None or subject.recipe.h100


def _require_taken(args: argparse.Namespace, subject: Subject) -> None:
    """Refuse options that would have no effect.

    Raises:
        SpecError: one is.
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
        _refuse({"--low-precision-params": True}, "--precision in FP8 or FP4 beside it", "add --precision fp8-current")
    if not subject.arch.num_experts:
        refused, why = of_experts, "none for a dense model"
    elif args.recipe is not None and args.overlap:
        refused, why = {"--overlap": args.overlap}, "none beside --recipe: no recipe has it"
    elif not _is_grouped(subject):
        refused = {"--dispatcher": of_experts["--dispatcher"]}
        refused["--recompute"] = args.recompute if "moe_act" in recompute else None
        why = "none for this recipe, which does not group the experts' products"
    else:
        return
    _refuse(refused, why, "omit {}, or use --model FOLDER")


def _refuse(options: dict[str, Any], expected: str, fix: str) -> None:
    """Raise for the first option that was given; `{}` in the fix stands for it."""
    for name, value in options.items():
        if value is not None:
            raise SpecError(name, got="it" if value is True else value, expected=expected, fix=fix.format(name))


def _size_name(name: str, micro_batch: int | None) -> str:
    """Return what the command line calls a size of a layout, or some of them; other names as they are."""
    if name == "micro_batch":
        return name if micro_batch else "--layout mbs"
    return f"--layout {name}" if {*name.split(" x ")} <= SIZES else name


def _ranks(text: str, plan: Plan) -> list[dict[str, int]]:
    layout = plan.layout
    parts = [str(rank) for rank in range(layout.gpus)] if text == "all" else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise SpecError("--rank", got=text, expected="a number, 1,2,3 or all", fix="use --rank 0")
    ranks = [int(part) for part in parts]
    stages = [layout.group_ranks(rank).pp for rank in ranks]
    plans = {stage: StagePlan(plan.request.arch, layout, plan.work, stage) for stage in set(stages)}
    return [
        {"rank": rank, "params": plans[stage].params, "expert_params": plans[stage].expert_params}
        for rank, stage in zip(ranks, stages, strict=True)
    ]


def _check(subject: Subject, plan: Plan) -> dict[str, Any]:
    from nemo_upcycle.planning.check import check_layout_against_megatron

    dense = subject.dense if subject.folder is None or subject.spec else None
    return asdict(check_layout_against_megatron(subject.arch, plan.layout, plan.work, dense, subject.spec))


def _text(
    args: argparse.Namespace, subject: Subject, plans: list[Plan], answer: dict[str, Any], names: list[str] | None
) -> str:
    width = shutil.get_terminal_size().columns  # 80 without a terminal

    def folded(text: str) -> str:
        options: dict[str, Any] = {"subsequent_indent": "  ", "break_long_words": False, "break_on_hyphens": False}
        return "\n".join(textwrap.fill(line, width, **options) for line in text.split("\n"))

    shown, left_out = table.table_text(plans, names, None if args.wide else width)
    row = args.explain or 1
    chosen, request = plans[row - 1], plans[0].request
    lines = [
        folded(table.model_line(request.arch, request.work.seq_length)),
        folded(
            f"{request.gpus} x {request.gpu.name}, {request.work.precision}, {request.tokens:.3g} tokens;"
            f" GiB of the fullest rank, tok/s of one GPU, MFU of {chosen.peak_tflops:g} TFLOP/s ({chosen.peak_of})"
        ),
        folded(_settings_line(chosen, answer["rows"][row - 1]["command"])),
        *(folded(f"warning: {warning}") for warning in answer["warnings"]),
        f"\n{shown}\n",
    ]
    if left_out and names is None:
        lines.append(folded(f"No room for {', '.join(left_out)}: --wide shows all, --columns GiB,MFU those you name."))
    if all(plan.verdict == "no" for plan in plans):
        lines.append(folded(_what_fits_instead(args, request)))
    if routing := table.routing_line(chosen):
        lines.append(folded(routing))
    lines.append(folded(f"A full checkpoint takes {plans[0].checkpoint_gib:.0f} GiB."))
    if faster := answer["faster_by_one_change"]:
        parts = [f"{percent:.0f} % with {change}" for change, percent in faster.items()]
        lines.append(folded(f"Faster by one change of row {row}: {', '.join(parts)}."))
    if args.explain is not None:
        lines.append(folded(table.explanation(chosen)))
    command, why_none = (answer["rows"][row - 1][name] for name in ("command", "no_command"))
    if command:
        lines.append(f"row {row}:\n" + _continued(re.findall(r'(?:[^\s"]|"[^"]*")+', command), width))
    elif why_none:
        lines.append(folded(f"{why_none}, so there is no command."))
    for rank in answer.get("ranks", []):
        counts = f"{rank['params']:,} parameters, {rank['expert_params']:,} of them of experts"
        lines.append(folded(f"rank {rank['rank']}: {counts}"))
    if checked := answer.get("check"):
        equal = "all equal in parameters, buffers of weights and gradients, and optimizer states"
        text = f"checked with Megatron's own modules: {checked['ranks']} ranks of {checked['kinds']} kinds, {equal}"
        lines += [folded(text), folded(f"built as: {', '.join(checked['specs'])}")]
        if checked["tensors"]:
            lines.append(folded(f"and the read plan fills each of their {checked['tensors']} tensors once"))
    return "\n".join(lines)


def _settings_line(plan: Plan, command: str | None) -> str:
    """Return the settings that a row's memory and speed count on."""
    work = plan.work
    names = {"gradients": work.gradients, "overlap": "+".join(work.overlap) or "none"}
    names |= {"dispatcher": work.dispatcher} if plan.request.arch.num_experts else {}
    names |= {"parameters": work.precision} if work.low_params else {}
    line = ", ".join(f"{name} {value}" for name, value in names.items()) + f", {plan.request.software}"
    return f"{line} (the recipe of the command overlaps nothing)" if command and work.overlap else line


def _continued(words: list[str], width: int) -> str:
    """Return a command over several lines that a shell takes as one."""
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + len("  \\") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(f"  {word}")
    return " \\\n".join(lines)


def _warnings(subject: Subject, request: PlanRequest) -> list[str]:
    length, positions = request.work.seq_length, subject.dense.max_positions
    if length <= positions:
        return []
    return [
        f"sequences of {length:,} tokens, but the parent has {positions:,} positions (max_position_embeddings): it was"
        " not trained on longer ones, and what it computes of them is poor at first"
    ]


def _faster(args: argparse.Namespace, subject: Subject, plan: Plan) -> dict[str, float]:
    """Return the best single change of a plan's layout and of its precision, with the percent of speed they add.

    Left out is what adds less than the model is usually wrong by, and what has no command where the plan has one.
    """
    best: dict[bool, tuple[float, str]] = {}
    why = why_no_command(args.backend, subject.recipe, plan.work)
    for change, other in single_changes(plan) if plan.verdict != "no" else ():
        gain = round(100 * (other.tokens_per_s_per_gpu / plan.tokens_per_s_per_gpu - 1), 1)
        if gain >= _LEAST_PERCENT and why_no_command(args.backend, subject.recipe, other.work) in ("", why):
            kind = change.startswith("--precision")
            best[kind] = max(best.get(kind, (gain, change)), (gain, change))
    return {change: gain for gain, change in sorted(best.values(), reverse=True)}


def _what_fits_instead(args: argparse.Namespace, request: PlanRequest) -> str:
    """Return what to say where nothing fits: something that does."""
    gpus = f"{request.gpus} GPU" + "s" * (request.gpus > 1)
    if args.layout is None:
        text = f"Nothing fits {gpus}: these come nearest."
    else:
        best = next(iter(find(request, 1)), None)
        if best and best.verdict != "no":
            return f"This layout does not fit. Of {gpus} this one does: --layout {best.layout.sizes}"
        text = f"This layout does not fit, nor does any other of {gpus}."
    number = nearest_gpus(request)
    without = " and without --layout" if args.layout else ""
    return text + (f" With --gpus {number}{without} something fits." if number else "")


def _command(args: argparse.Namespace, subject: Subject, plan: Plan) -> tuple[str | None, str]:
    """Return the command of a plan, or None and why the recipes have none."""
    why = why_no_command(args.backend, subject.recipe, plan.work)
    if why or subject.recipe is None or plan.verdict == "no":
        return None, why
    dense = str(subject.folder.absolute()) if subject.folder else None
    return (nemo_command if args.backend == "nemo" else bridge_command)(subject.recipe, plan, dense), ""
