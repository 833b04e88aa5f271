"""`nemo-upcycle plan`: what fits, with which layout, how fast, how long, at what cost."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.architecture import Architecture, read_architecture
from nemo_upcycle.errors import SpecError, UpcycleError, problem
from nemo_upcycle.planning import table
from nemo_upcycle.planning.hardware import KnownRecipe, gpu_names, known_gpu, known_recipe, recipe_for
from nemo_upcycle.planning.layout import Layout, parse_layout
from nemo_upcycle.planning.parameters import StagePlan
from nemo_upcycle.planning.search import Goal, Plan, judge, search
from nemo_upcycle.planning.throughput import Machine
from nemo_upcycle.planning.workload import DISPATCHERS, PRECISIONS, RECOMPUTES, Workload
from nemo_upcycle.spec import UpcycleSpec, check_capacity


HELP = "what fits where, how fast, how long, how much: layouts for a cluster, without a GPU"
EPILOG = """examples:
  nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 128
  nemo-upcycle plan --model /models/Llama-3-8B --experts 8 --top-k 2 --gpus 64 --tokens 27e9 --price-per-gpu-hour 2.5
  nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 512 --layout tp=2,pp=4,vp=8,cp=1,ep=8,etp=1 --explain 1 --check

exit status: 0 a layout fits (or is tight); 1 none does; 2 a value is wrong.
TFLOP/s and MFU count full attention, as arXiv 2412.09952 does; --json has the causal half beside it."""
_MOST_GPUS = 1_000_000
_DEFAULTS = {"seq_length": 8192, "global_batch": 512, "capacity_factor": None, "tokens": 100e9}


@dataclass(frozen=True)
class _Subject:
    """The model to plan for, what it is made from, and the recipe that runs it, if there is one.

    With `folder`, the model is that folder's, and the recipe was found by its shapes.
    """

    arch: Architecture
    dense: Architecture
    spec: UpcycleSpec | None
    recipe: KnownRecipe | None
    defaults: dict[str, Any]
    folder: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    what = parser.add_argument_group("what to train").add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help="a recipe of this package, with its batch, sequence and tokens")
    what.add_argument("--model", metavar="FOLDER", type=Path, help="a Hugging Face folder (config.json), dense or MoE")
    model = parser.add_argument_group("model and step")
    model.add_argument("--experts", type=int, metavar="N", help="upcycle a dense --model to so many experts")
    model.add_argument("--top-k", type=int, metavar="K", help="experts that a token passes through (default: 2)")
    model.add_argument("--granularity", type=int, metavar="G", help="parts of a dense network (default: 1)")
    model.add_argument("--seq-length", type=int, metavar="TOKENS", help="tokens of a sequence (default: 8192)")
    model.add_argument("--global-batch", type=int, metavar="SEQUENCES", help="sequences of a step (default: 512)")
    model.add_argument("--capacity-factor", type=float, metavar="CF", help="of the experts; 0 drops nothing")
    model.add_argument("--pad-to-capacity", action="store_true", help="pad every expert up to its capacity")
    model.add_argument("--imbalance", type=float, default=1.5, metavar="X", help="busiest over mean expert rank (1.5)")
    model.add_argument("--precision", default="bf16", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: bf16)")
    model.add_argument("--dispatcher", default="alltoall", metavar="NAME", help=f"{', '.join(DISPATCHERS)} (alltoall)")
    model.add_argument("--overlap", metavar="tp,ep", help="traffic beside computation; the recipes have none")
    model.add_argument("--tokens", type=float, metavar="N", help="tokens of the run (default: 100e9)")
    cluster = parser.add_argument_group("cluster")
    cluster.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    cluster.add_argument("--gpu", default="h100", metavar="NAME", help=f"{', '.join(gpu_names())} (default: h100)")
    cluster.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE", help="in your currency")
    layout = parser.add_argument_group("layout")
    layout.add_argument(
        "--layout", metavar="tp=2,pp=4,...", help="judge this one; keys tp pp vp cp ep etp mbs first last"
    )
    layout.add_argument("--micro-batch", type=int, metavar="N", help="sequences of a micro-batch (default: searched)")
    layout.add_argument("--recompute", metavar="KIND", help=f"{', '.join(RECOMPUTES)} (default: the least that fits)")
    layout.add_argument("--rows", type=int, default=10, metavar="N", help="layouts to show (default: 10)")
    show = parser.add_argument_group("output")
    show.add_argument("--explain", type=int, metavar="ROW", help="show the arithmetic of a row")
    show.add_argument("--rank", metavar="R", help="parameters of rank R (a number, 1,2,3 or all) in the first row")
    show.add_argument("--check", action="store_true", help="compare the first row with Megatron's own modules")
    show.add_argument("--json", action="store_true", help="one JSON object on stdout")


def run(args: argparse.Namespace) -> int:
    """Plan, print, and return the exit status.

    Raises:
        UpcycleError: a value is wrong.
    """
    subject = _subject(args)
    goal = _goal(args, subject)
    plans = _plans(args, goal)
    ranks = _ranks(args.rank, plans[0]) if args.rank is not None else None
    if args.explain is not None and not 1 <= args.explain <= len(plans):
        raise SpecError(problem("explain", got=args.explain, expected=f"a row, 1 to {len(plans)}", fix="choose one"))
    checked = _check(subject, plans[0]) if args.check else None
    if args.json:
        _print_json(args, subject, goal, plans, ranks, checked)
    else:
        _print_text(args, subject, goal, plans, ranks, checked)
    return 1 if all(plan.verdict == "no" for plan in plans) else 0


def _subject(args: argparse.Namespace) -> _Subject:
    if args.recipe is not None:
        for name in ("experts", "top_k", "granularity"):
            if (value := getattr(args, name)) is not None:
                fix = "use --model FOLDER --experts N --top-k K"
                what = name.replace("_", "-")
                raise SpecError(problem(what, got=value, expected="none beside --recipe", fix=fix))
        known = known_recipe(args.recipe)
        return _Subject(known.made, known.dense, known.spec, known, _DEFAULTS | known.defaults)
    folder = args.model.parent if args.model.name == "config.json" else args.model
    arch = read_architecture(folder)
    if args.experts is None:
        for name in ("top_k", "granularity"):
            if (value := getattr(args, name)) is not None:
                what = name.replace("_", "-")
                raise SpecError(problem(what, got=value, expected="--experts beside it", fix="add --experts 8"))
        return _Subject(arch, arch, None, recipe_for(arch, arch), _DEFAULTS, folder)
    if arch.num_experts:
        fix = "leave --experts away: an MoE model is planned as it is"
        raise SpecError(problem("experts", got=args.experts, expected="a dense model", fix=fix))
    given = {name: getattr(args, name) for name in ("top_k", "granularity") if getattr(args, name) is not None}
    spec = UpcycleSpec(num_experts=args.experts, **given)
    made = arch.upcycled(spec)
    return _Subject(made, arch, spec, recipe_for(arch, made), _DEFAULTS, folder)


def _goal(args: argparse.Namespace, subject: _Subject) -> Goal:
    def given(name: str) -> Any:
        value = getattr(args, name)
        return subject.defaults[name] if value is None else value

    if not 1 <= args.gpus <= _MOST_GPUS:
        raise SpecError(problem("gpus", got=args.gpus, expected=f"1 to {_MOST_GPUS:,}", fix="set --gpus 8"))
    if args.price_per_gpu_hour is not None and not 0 <= args.price_per_gpu_hour < 1e9:
        got, fix = args.price_per_gpu_hour, "set --price-per-gpu-hour 2.5"
        raise SpecError(problem("price-per-gpu-hour", got=got, expected="0 or more", fix=fix))
    if args.rows < 1:
        raise SpecError(problem("rows", got=args.rows, expected="1 or more", fix="set --rows 10"))
    if not 0 < given("tokens") < float("inf"):
        raise SpecError(problem("tokens", got=given("tokens"), expected="more than 0", fix="set --tokens 100e9"))
    _require_taken(args, subject)
    capacity = given("capacity_factor") or None
    if subject.arch.num_experts:
        check_capacity(capacity, args.pad_to_capacity, subject.arch.num_experts, subject.arch.top_k or 1)
    work = Workload(
        seq_length=given("seq_length"),
        global_batch=given("global_batch"),
        capacity_factor=capacity if subject.arch.num_experts else None,
        pad=args.pad_to_capacity,
        imbalance=args.imbalance,
        precision=args.precision,
        recompute=args.recompute or "none",
        dispatcher=args.dispatcher,
        overlap=tuple(args.overlap.split(",")) if args.overlap else (),
    )
    gpu = known_gpu(args.gpu)
    if work.numbers.fp8 and gpu.fp8_tflops is None:
        raise SpecError(problem("precision", got=args.precision, expected=f"bf16 on {gpu.name}", fix="use bf16"))
    return Goal(subject.arch, gpu, args.gpus, work, given("tokens"), Machine(), _is_grouped(subject))


def _is_grouped(subject: _Subject) -> bool:
    """Return whether the experts' products are grouped: in all recipes but those for a laptop."""
    return subject.recipe is None or subject.recipe.h100


def _require_taken(args: argparse.Namespace, subject: _Subject) -> None:
    """Check that no option is given that would change nothing.

    Raises:
        SpecError: one is.
    """
    overlap = (args.overlap or "").split(",")
    of_experts = {
        "capacity-factor": args.capacity_factor,
        "pad-to-capacity": args.pad_to_capacity or None,
        "dispatcher": None if args.dispatcher == "alltoall" else args.dispatcher,
        "overlap": "ep" if "ep" in overlap else None,
        "recompute": "moe_act" if args.recompute == "moe_act" else None,
    }
    if not subject.arch.num_experts:
        refused, why = of_experts, "none for a dense model"
    elif args.recipe is not None and args.overlap:
        refused, why = {"overlap": args.overlap}, "none beside --recipe: no recipe has it"
    elif not _is_grouped(subject):
        refused = {name: of_experts[name] for name in ("dispatcher", "recompute")}
        why = "none for this recipe, which does not group the experts' products"
    else:
        return
    for name, value in refused.items():
        if value is not None:
            fix = f"leave --{name} away, or use --model FOLDER"
            raise SpecError(problem(name, got="it" if value is True else value, expected=why, fix=fix))


def _plans(args: argparse.Namespace, goal: Goal) -> list[Plan]:
    micro = args.micro_batch
    if micro is not None and not 1 <= micro <= goal.work.global_batch:
        expected, fix = f"1 to the global batch ({goal.work.global_batch})", "set --micro-batch 1"
        raise SpecError(problem("micro-batch", got=micro, expected=expected, fix=fix))
    if args.layout is None:
        return search(goal, args.rows, micro, args.recompute)
    return [judge(goal, parse_layout(args.layout, args.gpus, micro), args.recompute)]


def _ranks(text: str, plan: Plan) -> list[dict[str, int]]:
    layout: Layout = plan.layout
    parts = [str(rank) for rank in range(layout.gpus)] if text == "all" else text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise SpecError(problem("rank", got=text, expected="a number, 1,2,3 or all", fix="use --rank 0"))
    stages: dict[int, StagePlan] = {}
    found = []
    for rank in map(int, parts):
        seat = layout.seat(rank)
        if seat.pp not in stages:
            stages[seat.pp] = StagePlan(plan.goal.arch, layout, plan.work, seat.pp)
        stage = stages[seat.pp]
        found.append({"rank": rank, "params": stage.params, "expert_params": stage.expert_params})
    return found


def _check(subject: _Subject, plan: Plan) -> dict[str, Any]:
    if importlib.util.find_spec("megatron") is None:
        fix = "pip install 'nemo-upcycle[nemo]'"
        raise UpcycleError(problem("--check", got="no megatron-core", expected="megatron-core", fix=fix))
    from nemo_upcycle.planning.check import check_layout_against_megatron

    dense = subject.dense if subject.folder is None or subject.spec else None
    result = check_layout_against_megatron(subject.arch, plan.layout, plan.work, dense, subject.spec)
    return result.to_dict()


def _print_json(
    args: argparse.Namespace,
    subject: _Subject,
    goal: Goal,
    plans: list[Plan],
    ranks: list[dict[str, int]] | None,
    checked: dict[str, Any] | None,
) -> None:
    arch, length = goal.arch, goal.work.seq_length
    values: dict[str, Any] = {
        "model": {
            "total_params": arch.total_params,
            "active_params": arch.active_params,
            "flops_per_token": {
                "full": arch.flops_per_token(length, causal=False),
                "causal": arch.flops_per_token(length, causal=True),
            },
        },
        "rows": [table.row_values(plan, _command(subject, plan), args.price_per_gpu_hour) for plan in plans],
    }
    values |= {"ranks": ranks} if ranks is not None else {}
    values |= {"check": checked} if checked is not None else {}
    sys.stdout.write(json.dumps(values, indent=2) + "\n")


def _print_text(
    args: argparse.Namespace,
    subject: _Subject,
    goal: Goal,
    plans: list[Plan],
    ranks: list[dict[str, int]] | None,
    checked: dict[str, Any] | None,
) -> None:
    def say(text: str = "") -> None:
        sys.stdout.write(text + "\n")

    say(table.model_line(goal.arch, goal.work.seq_length))
    say(f"{goal.gpus} x {goal.gpu.name}, {goal.work.precision}, {goal.tokens:.3g} tokens; GiB of the fullest rank")
    say()
    say(table.table_text(plans, args.price_per_gpu_hour))
    say()
    if args.layout is not None and plans[0].verdict == "no":
        say("This layout does not fit. Leave --layout away, and the planner looks for one that does.")
    elif all(plan.verdict == "no" for plan in plans):
        say("Nothing fits: these come nearest. Use more GPUs or a card with more memory.")
    say(f"A full checkpoint takes {plans[0].checkpoint_gib:.0f} GiB.")
    chosen = plans[(args.explain or 1) - 1]
    if args.explain is not None:
        say(table.explanation(chosen))
    if command := _command(subject, chosen):
        say(f"row {args.explain or 1}: {command}")
    else:
        say("No recipe of this package trains this model, so there is no command. See docs/planning.md.")
    for entry in ranks or []:
        say(f"rank {entry['rank']}: {entry['params']:,} parameters, {entry['expert_params']:,} of them of experts")
    if checked:
        say(f"checked with Megatron's own modules: {checked['ranks']} ranks of {checked['kinds']} kinds, all equal")
        say(f"built as: {', '.join(checked['specs'])}")
        if checked["tensors"]:
            say(f"and the connector's read plan fills each of their {checked['tensors']} tensors once")


def _command(subject: _Subject, plan: Plan) -> str | None:
    if subject.recipe is None:
        return None
    return table.nemo_command(subject.recipe, plan, str(subject.folder.absolute()) if subject.folder else None)
