"""`nemo-upcycle advise`: go on dense, upcycle, or train an MoE from nothing: costs, and what is known of each."""

from __future__ import annotations

import argparse
from typing import Any

from nemo_upcycle.cli.common import show
from nemo_upcycle.cli.plan_request import add_shared_options, router_order
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.rotary import rope_kind
from nemo_upcycle.planning import hardware
from nemo_upcycle.planning.advice import DenseParent, Option, nearest_outcomes, options
from nemo_upcycle.planning.law import fitted_law
from nemo_upcycle.planning.memory import GIB
from nemo_upcycle.planning.search import MOST_GPUS, PlanRequest
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.console import folded, in_columns, short_count
from nemo_upcycle.utils.validation import check_number, check_whole, number_of_tokens


EPILOG = """examples:
  nemo-upcycle advise --model asset://smollm2-135m --trained-on 2T --gpus 8 --tokens 1B
  nemo-upcycle advise --model /models/Llama-3-8B --trained-on 15T --gpus 128 --hours 48 --price-per-gpu-hour 2.5
  nemo-upcycle advise --model mine --trained-on 300B --gpus 64 --tokens 100B --experts 16 --top-k 4

Differences are of the held-out loss to that of the dense model trained on, in nats a token; below 0 is better. --hours
gives each option the tokens that it reaches in them, --tokens the same to all.

exit status: 0 the fitted law decides on an option; 1 it does not; 2 a value is wrong."""
_BYTES_SERVED = 2  # of a parameter, in BF16
_OUTCOMES = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    model = parser.add_argument_group("the dense model, and what it would become (default: 8 experts, top-2)")
    text = "a Hugging Face folder or its config.json, hf://ORG/NAME on the hub, asset://smollm2-135m"
    model.add_argument("--model", required=True, metavar="MODEL", help=text)
    text = "tokens that it was trained on: 15T, 300B"
    model.add_argument("--trained-on", required=True, type=_parent_tokens, metavar="N", help=text)
    budget = parser.add_argument_group("budget").add_mutually_exclusive_group(required=True)
    budget.add_argument("--hours", type=float, metavar="H", help="of all GPUs, for each option")
    budget.add_argument("--tokens", type=number_of_tokens, metavar="N", help="for each option: 100B, 27e9")
    add_shared_options(model, parser.add_argument_group("cluster"))
    parser.set_defaults(num_experts=8, top_k=2, granularity=1, global_batch=512)


def _parent_tokens(text: str) -> float:
    return number_of_tokens(text, "--trained-on")


def run(args: argparse.Namespace) -> int:
    """Advise, print, and return the exit status.

    Raises:
        UpcycleError: a value is wrong.
    """
    from nemo_upcycle.data.dense import configuration_folder

    arch = read_architecture(configuration_folder(args.model))
    rope_kind(arch)  # training refuses another kind, too
    if arch.num_experts:
        fix = "name the dense model; of an MoE, `nemo-upcycle plan` says what training it costs"
        raise SpecError("--model", got=f"{arch.num_experts} experts", expected="a dense model", fix=fix)
    sizes = {name: getattr(args, name) for name in ("num_experts", "top_k", "granularity")}
    spec = UpcycleSpec(**sizes, router_order=router_order(args.top_k))
    parent, law = DenseParent(args.trained_on, arch.total_params), fitted_law()
    found = options(_request(args, arch), spec, args.hours)
    trainings = [option.training for option in found]
    best, why = parent.decide(law, trainings) if law else (None, "no law was fitted yet")
    expected = {one.name: parent.expect(law, one, trainings[0]) if law else None for one in trainings}
    answer = {
        "model": {"parameters": arch.total_params, "trained_on": args.trained_on},
        "options": {
            option.training.name: _costs(option) | {"fitted": says.values() if says else None}
            for option, says in zip(found, expected.values(), strict=True)
        },
        "law": {"about": law.about, "source": law.source, "why": why} if law else None,
        "best": best,
        "outcomes": nearest_outcomes(parent),
    }
    show(args, answer, _text(args, found, answer, why))
    return 0 if best else 1


def _request(args: argparse.Namespace, arch: Architecture) -> PlanRequest:
    check_whole("gpus", args.gpus, 1, MOST_GPUS)
    for name, least, most in (("hours", 0.001, 1e6), ("price_per_gpu_hour", 0, 1e6)):
        if getattr(args, name) is not None:
            check_number(name, getattr(args, name), least, most)
    work = Workload(
        seq_length=min(8192, arch.max_positions) if args.seq_length is None else args.seq_length,
        global_batch=args.global_batch,
        precision=args.precision,
        gradients="bf16",
        routing="natural",
    )
    gpu = hardware.known_gpu(args.gpu)
    return PlanRequest(
        arch=arch,
        gpu=gpu,
        gpus=args.gpus,
        work=work,
        tokens=args.tokens or 1.0,
        software=hardware.BRIDGE_SOFTWARE if gpu.is_blackwell else hardware.DEFAULT_SOFTWARE,
        usual=("dispatcher", "overlap"),
        price_per_gpu_hour=args.price_per_gpu_hour,
    )


def _costs(option: Option) -> dict[str, Any]:
    """List what an option costs, for machines."""
    plan, arch = option.plan, option.plan.request.arch
    return {
        "fits": plan.verdict,
        "layout": plan.layout.sizes,
        "tokens": option.training.tokens,
        "hours": round(plan.hours, 2),
        "gpu_hours": round(plan.gpu_hours, 1),
        "cost": None if plan.cost is None else round(plan.cost, 2),
        "memory_gib": round(plan.memory.total / GIB, 1),
        "active_parameters": arch.active_params,
        "total_parameters": arch.total_params,
        "served_bytes": _BYTES_SERVED * arch.total_params,
    }


def _text(args: argparse.Namespace, found: list[Option], answer: dict[str, Any], why: str) -> str:
    request, parameters = found[0].plan.request, answer["model"]["parameters"]
    budget = f"{args.hours:g} hours" if args.hours is not None else f"{short_count(args.tokens)} tokens"
    lines = [
        f"A dense model of {short_count(parameters)} parameters, trained on {short_count(args.trained_on)} tokens"
        f" ({args.trained_on / parameters:,.0f} a parameter); {budget} on {args.gpus} x {request.gpu.name},"
        f" {args.precision}, natural routing.",
        "",
        *_cost_table(answer["options"], has_price=args.price_per_gpu_hour is not None),
        "",
        "Published, the nearest first (the parent's tokens and parameters, as times yours):",
    ]
    for one in answer["outcomes"][:_OUTCOMES]:
        parent = (
            f"{one['parent']} after {short_count(one['parent_tokens'])} tokens" if one["distance"] else one["parent"]
        )
        times = " and ".join(f"{ratio:,.3g}" for ratio in one["distance"].values()) or "unknown"
        lines.append(f"- {one['reading']} ({times}): {parent}: {one['said']} ({one['source']})")
    lines.append("")
    if answer["law"]:
        lines.append(f"The law of {answer['law']['source']} ({answer['law']['about']}): {why}.")
        lines += [
            f"- {name}: {says['loss_difference']:+.3f} nats a token beside `dense`"
            f" (90 % {says['band_90'][0]:+.3f} to {says['band_90'][1]:+.3f})"
            for name, says in ((name, values["fitted"]) for name, values in answer["options"].items())
            if says and says["near"] and says["band_90"] and name != "dense"
        ]
    verdict = f"{answer['best']}. That is of the loss alone: weigh against it what serving costs"
    lines.append(f"Verdict: {verdict if answer['best'] else 'not resolved'}.")
    return "\n".join(line if "  " in line else folded(line) for line in lines)


def _cost_table(values: dict[str, Any], *, has_price: bool) -> list[str]:
    rows = [["option", "tokens", "hours", "GPU-hours", *["cost"] * has_price, "GiB", "active", "total", "served"]]
    for name, value in values.items():
        cost = [f"{value['cost']:,.0f}"] if has_price else []
        cells = [short_count(value["tokens"]), f"{value['hours']:,.1f}", f"{value['gpu_hours']:,.0f}", *cost]
        if value["fits"] == "no":
            cells = ["no fit", *["-"] * (len(cells) - 1)]
        sizes = [short_count(value["active_parameters"]), short_count(value["total_parameters"])]
        rows.append([name, *cells, f"{value['memory_gib']:.1f}", *sizes, f"{value['served_bytes'] / 1e9:,.3g} GB"])
    return in_columns(rows, right=range(1, len(rows[0])))
