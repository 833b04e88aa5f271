"""`nemo-upcycle plan`: find the layouts that fit, with their speed, duration and cost."""

from __future__ import annotations

import argparse
import re
from typing import Any

from nemo_upcycle.cli.common import OptionRow, add_options, show
from nemo_upcycle.cli.plan_request import Subject, request_of, subject_of
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.planning import hardware, table
from nemo_upcycle.planning.layout import SIZES, parse_layout
from nemo_upcycle.planning.search import (
    LayoutEstimate,
    PlanRequest,
    evaluate_layout,
    find,
    nearest_gpus,
    search,
)
from nemo_upcycle.planning.workload import (
    DISPATCHERS,
    GRADIENTS,
    PRECISIONS,
    RECOMPUTES,
    ROUTINGS,
)
from nemo_upcycle.trainers.backends import BACKENDS
from nemo_upcycle.utils.console import folded, terminal_width
from nemo_upcycle.utils.validation import check_whole, number_of_tokens


EPILOG = """examples:
  nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 128
  nemo-upcycle plan --model asset://smollm2-135m --experts 8 --gpus 1 --gpu rtx4090
  nemo-upcycle plan --model /models/Llama-3-8B --experts 8 --top-k 2 --gpus 64 --tokens 27B --price-per-gpu-hour 2.5
  nemo-upcycle plan --recipe llama3_8b_e8t2 --gpus 512 --layout tp=2,pp=4,vp=8,cp=1,ep=8,etp=1 --explain 1

keys of --layout (default: 1): tp, cp, ep and etp are the sizes of tensor, context, expert and expert tensor
  parallelism; pp pipeline stages; vp virtual stages of each; mbs sequences per micro-batch; dp data parallelism, which
  follows from the others; first, last: layers of the first and last stage; embedding=1, loss=1: count it as a layer

exit status: 0 a layout fits (or is tight); 1 no layout fits; 2 wrong value.
TFLOP/s and MFU count full attention, as in arXiv 2412.09952; --json also has them for the causal half."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    what = parser.add_argument_group("what to train").add_mutually_exclusive_group(required=True)
    what.add_argument("--recipe", metavar="NAME", help="a recipe of this package, with its batch, sequence and tokens")
    text = (
        "dense or MoE: a Hugging Face folder or its config.json, a NeMo or Megatron checkpoint, ORG/NAME or"
        " hf://ORG/NAME on the hub, asset://smollm2-135m"
    )
    what.add_argument("--model", metavar="MODEL", help=text)
    model, cluster = (parser.add_argument_group(title) for title in ("model and step", "cluster"))
    upcycling: dict[str, OptionRow] = {
        "num_experts": (int, "N", "number of experts to upcycle --model to"),
        "top_k": (
            int,
            "K",
            "experts that process each token (default: 2, or the number that keeps --model's function)",
        ),
        "granularity": (int, "G", "number of parts of the dense network (default: 1)"),
        "seq_length": (int, "TOKENS", "tokens per sequence (default: 8192)"),
        "global_batch": (int, "SEQUENCES", "sequences per step (default: 512)"),
    }
    add_options(model, upcycling)
    precisions = f"{', '.join(PRECISIONS)}; the last two need Blackwell (default: bf16)"
    add_options(model, {"precision": (str, "NAME", precisions)}, "bf16")
    cluster.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    add_options(cluster, {"gpu": (str, "NAME", f"{', '.join(hardware.gpu_names())} (default: h100)")}, "h100")
    add_options(cluster, {"price_per_gpu_hour": (float, "PRICE", "price in your currency, to show the cost")})
    dispatchers = f"{', '.join(DISPATCHERS)} (default: alltoall, or hybridep with --model on Blackwell)"
    beside = "overlapped communication (default: none for recipes; with --model, as in NVIDIA's recipes)"
    step: dict[str, OptionRow] = {
        "capacity_factor": (float, "CF", "capacity factor of the experts; 0 drops no tokens"),
        "imbalance": (
            float,
            "X",
            "load of the busiest expert rank over the mean (default: 1.5; with --routing balanced: 1.11)",
        ),
        "dispatcher": (str, "NAME", dispatchers),
        "routing": (str, "NAME", f"{', '.join(ROUTINGS)} (default: balanced)"),
        "overlap": (str, "tp,ep,launch", beside),
        "tokens": (number_of_tokens, "N", "tokens of the run: 100B, 27e9 (default: 100B)"),
    }
    add_options(model, step)
    model.add_argument("--pad-to-capacity", action="store_true", help="pad every expert to its capacity")
    text = "keep parameters in FP8 or FP4 (default: only with a dense --model that no recipe trains)"
    switch = argparse.BooleanOptionalAction
    model.add_argument("--low-precision-params", dest="low_params", action=switch, help=text)
    text = f"{', '.join(GRADIENTS)}; type in which gradients are summed (default: from the recipe; with --model bf16)"
    model.add_argument("--grad-dtype", dest="gradients", metavar="NAME", help=text)
    recomputes = f"{', '.join(RECOMPUTES)}, or several modules: layernorm,moe_act (default: the fastest that fits)"
    layout: dict[str, OptionRow] = {
        "layout": (str, "tp=2,pp=4,...", "evaluate this layout; its keys are listed below"),
        "micro_batch": (int, "N", "sequences per micro-batch (default: searched)"),
        "recompute": (str, "KIND", recomputes),
    }
    group = parser.add_argument_group("layout")
    add_options(group, layout)
    add_options(group, {"rows": (int, "N", "number of layouts to show (default: 10)")}, 10)
    group = parser.add_argument_group("output")
    add_options(group, {"explain": (int, "ROW", "show the arithmetic of a row")})
    add_options(
        group, {"backend": (str, "NAME", "trainer whose command is printed: nemo or bridge (default: nemo)")}, "nemo"
    )


def run(args: argparse.Namespace) -> int:
    """Plan, print, and return the exit status.

    Raises:
        UpcycleError: a value is wrong.
    """
    if args.backend not in BACKENDS:
        raise SpecError.unknown("backend", args.backend, BACKENDS)
    subject = subject_of(args)
    request = request_of(args, subject)
    try:
        if args.layout is None:
            plans = search(request, args.rows)
            if subject.recipe and subject.recipe.tunes:
                plans = [plan for plan in plans if plan.layout.takes_packs] or plans
        else:
            plans = [evaluate_layout(request, parse_layout(args.layout, args.gpus, args.micro_batch))]
    except SpecError as error:
        raise error.renamed(lambda name: _size_name(name, args.micro_batch)) from None
    if args.explain is not None:
        check_whole("explain", args.explain, 1, len(plans))
    rows = [table.row_values(plan, *_command(args, subject, plan)) for plan in plans]
    arch, length = request.arch, request.work.seq_length
    flops = {name: flops_per_token(arch, length, causal=name == "causal") for name in ("full", "causal")}
    model = {"total_params": arch.total_params, "active_params": arch.active_params, "flops_per_token": flops}
    answer: dict[str, Any] = {"model": model, "rows": rows, "warnings": _warnings(subject, request)}
    show(args, answer, "" if args.json else _text(args, plans, answer))
    return 1 if all(plan.verdict == "no" for plan in plans) else 0


def _size_name(name: str, micro_batch: int | None) -> str:
    """Return the command-line name of one size or of several sizes; return other names unchanged."""
    if name == "micro_batch":
        return name if micro_batch else "--layout mbs"
    return f"--layout {name}" if {*name.split(" x ")} <= SIZES else name


def _text(args: argparse.Namespace, plans: list[LayoutEstimate], answer: dict[str, Any]) -> str:
    row = args.explain or 1
    chosen, request = plans[row - 1], plans[0].request
    lines = [
        folded(table.model_line(request.arch, request.work.seq_length)),
        folded(
            f"{request.gpus} x {request.gpu.name}, {request.work.precision}, {request.tokens:.3g} tokens;"
            f" GiB of the fullest rank, tok/s per GPU, MFU against {chosen.peak_tflops:g} TFLOP/s ({chosen.peak_of})"
        ),
        folded(_settings_line(chosen, answer["rows"][row - 1]["command"])),
        *(folded(f"warning: {warning}") for warning in answer["warnings"]),
        f"\n{table.table_text(plans)}\n",
    ]
    if all(plan.verdict == "no" for plan in plans):
        lines.append(folded(_what_fits_instead(args, request)))
    if routing := table.routing_line(chosen):
        lines.append(folded(routing))
    lines.append(folded(f"A full checkpoint takes {plans[0].checkpoint_gib:.0f} GiB."))
    if args.explain is not None:
        lines.append(folded(table.explanation(chosen)))
    command, why_none = (answer["rows"][row - 1][name] for name in ("command", "no_command"))
    if command:
        lines.append(f"row {row}:\n" + _continued(re.findall(r'(?:[^\s"]|"[^"]*")+', command)))
    elif why_none:
        lines.append(folded(f"{why_none}, so there is no command."))
    return "\n".join(lines)


def _settings_line(plan: LayoutEstimate, command: str | None) -> str:
    """Return the settings on which the memory and speed of a row depend."""
    work = plan.work
    names = {"gradients": work.gradients, "overlap": "+".join(work.overlap) or "none"}
    names |= {"dispatcher": work.dispatcher} if plan.request.arch.num_experts else {}
    names |= {"parameters": work.precision} if work.low_params else {}
    line = ", ".join(f"{name} {value}" for name, value in names.items()) + f", {plan.request.software}"
    return f"{line} (the command's recipe overlaps nothing)" if command and work.overlap else line


def _continued(words: list[str]) -> str:
    """Break a command into several lines that a shell reads as one command."""
    width, lines = terminal_width(), [words[0]]
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
        f"sequences have {length:,} tokens, but the parent has only {positions:,} positions (max_position_embeddings),"
        " so its results for longer sequences are poor at first"
    ]


def _what_fits_instead(args: argparse.Namespace, request: PlanRequest) -> str:
    """Suggest a layout or a number of GPUs that fits, because no row fits."""
    gpus = f"{request.gpus} GPU" + "s" * (request.gpus > 1)
    if args.layout is None:
        text = f"No layout fits {gpus}; the nearest ones are shown."
    else:
        best = next(iter(find(request, 1)), None)
        if best and best.verdict != "no":
            return f"This layout does not fit. On {gpus}, this one fits: --layout {best.layout.sizes}"
        text = f"This layout does not fit, and no other layout fits {gpus}."
    number = nearest_gpus(request)
    without = " and without --layout" if args.layout else ""
    return text + (f" A layout fits with --gpus {number}{without}." if number else "")


def _command(args: argparse.Namespace, subject: Subject, plan: LayoutEstimate) -> tuple[str | None, str]:
    """Return the command that trains with a plan; or None, and the reason why no recipe can train with it."""
    backend = BACKENDS[args.backend]
    why = backend.why_no_command(subject.recipe, plan.work)
    if why or subject.recipe is None or plan.verdict == "no":
        return None, why
    dense = str(subject.folder.absolute()) if subject.folder else None
    return backend.command(subject.recipe, plan, dense), ""
