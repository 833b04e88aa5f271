"""`nemo-upcycle advise`: go on dense, upcycle, or train an MoE from nothing: costs, and what is known of each."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from nemo_upcycle.cli.common import show
from nemo_upcycle.cli.plan_request import router_order
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.rotary import rope_kind
from nemo_upcycle.planning import hardware
from nemo_upcycle.planning.advice import Option, Question, Verdict, expectation_values, option_values, ratio_text
from nemo_upcycle.planning.law import Law, fitted_law, published_checks, published_law, published_outcomes
from nemo_upcycle.planning.search import MOST_GPUS, PlanRequest
from nemo_upcycle.planning.workload import PRECISIONS, Workload
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.console import in_columns, short_count
from nemo_upcycle.utils.validation import check_number, check_whole, number_of_tokens


EPILOG = """examples:
  nemo-upcycle advise --model /models/Llama-3-8B --trained-on 15T --gpus 128 --hours 48 --price-per-gpu-hour 2.5
  nemo-upcycle advise --model mine --trained-on 300B --gpus 64 --tokens 100B --experts 8,16 --top-k 2,4
  nemo-upcycle advise --model mine --trained-on 300B --gpus 64 --hours 24 --grid runs/budget

Differences are of the held-out loss to that of the dense model trained on, in nats a token; below 0 is better. --hours
gives each option the tokens that it reaches in them, --tokens the same to all. --grid fits the law to your own
trainings, which takes some seconds.

exit status: 0 an option is decided on; 1 none is; 2 a value is wrong."""
#: Trains parents of several budgets, and what follows them.
_GRID = "nemo upcycle ablate --grid budget dir=runs/budget at_once=2 --yes"
_READINGS = {"for": "It paid:", "against": "What it brings fades:"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    model = parser.add_argument_group("the dense model, and what it would become")
    text = "a Hugging Face folder or its config.json, hf://ORG/NAME on the hub, asset://smollm2-135m"
    model.add_argument("--model", required=True, metavar="MODEL", help=text)
    text = "tokens that it was trained on: 15T, 300B"
    model.add_argument("--trained-on", required=True, type=_parent_tokens, metavar="N", help=text)
    text = "experts (default: 8); with commas several MoEs, as --top-k and --granularity"
    model.add_argument(
        "--experts", dest="num_experts", type=_numbers("--experts"), default=[8], metavar="N", help=text
    )
    text = "experts that a token passes through (default: 2)"
    model.add_argument("--top-k", type=_numbers("--top-k"), default=[2], metavar="K", help=text)
    text = "parts of a dense network (default: 1)"
    model.add_argument("--granularity", type=_numbers("--granularity"), default=[1], metavar="G", help=text)
    budget = parser.add_argument_group("budget").add_mutually_exclusive_group(required=True)
    budget.add_argument("--hours", type=float, metavar="H", help="of all GPUs, for each option")
    budget.add_argument("--tokens", type=number_of_tokens, metavar="N", help="for each option: 100B, 27e9")
    cluster = parser.add_argument_group("cluster and step")
    cluster.add_argument("--gpus", type=int, required=True, metavar="N", help="number of GPUs")
    text = f"{', '.join(hardware.gpu_names())} (default: h100)"
    cluster.add_argument("--gpu", default="h100", metavar="NAME", help=text)
    cluster.add_argument("--price-per-gpu-hour", type=float, metavar="PRICE", help="in your currency")
    cluster.add_argument(
        "--precision", default="bf16", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: bf16)"
    )
    text = "tokens of a sequence (default: 8192, or the model's positions)"
    cluster.add_argument("--seq-length", type=int, metavar="TOKENS", help=text)
    text = "sequences of a step (default: 512)"
    cluster.add_argument("--global-batch", type=int, default=512, metavar="SEQUENCES", help=text)
    text = "your own grid: its folder, or its points.csv"
    parser.add_argument_group("law").add_argument("--grid", metavar="PATH", help=text)


def _parent_tokens(text: str) -> float:
    return number_of_tokens(text, "--trained-on")


def _numbers(option: str) -> Callable[[str], list[int]]:
    """Return what reads an option's numbers, with commas between."""

    def read(text: str) -> list[int]:
        parts = [part.strip() for part in text.split(",")]
        if not all(part.isdecimal() for part in parts):
            raise SpecError(option, got=repr(text), expected="whole numbers: 8 or 8,16", fix=f"set {option} 8")
        return [int(part) for part in parts]

    return read


def run(args: argparse.Namespace) -> int:
    """Advise, print, and return the exit status.

    Raises:
        UpcycleError: a value is wrong.
    """
    question = _question(args)
    options = question.options(_specs(args))
    laws = {"published": published_law()}
    fitted = _grid_law(args.grid) if args.grid else fitted_law()
    laws |= {"fitted": fitted} if fitted else {}
    verdicts = {name: question.parent.decide(law, options) for name, law in laws.items()}
    answer = {
        "model": {"parameters": question.parameters, "trained_on": args.trained_on},
        "options": {
            option.name: option_values(option)
            | {name: expectation_values(question.parent.expect(law, option, options[0])) for name, law in laws.items()}
            for option in options
        },
        "laws": {
            name: {"about": law.about, "source": law.source, "left_out": dict(law.left_out)} | vars(verdicts[name])
            for name, law in laws.items()
        },
        "best": verdicts["fitted"].best if fitted else None,
        "grid_command": _GRID,
        "checks": published_checks(),
        "outcomes": published_outcomes(),
    }
    show(args, answer, "" if args.json else _text(args, question, options, laws, verdicts, answer))
    return 0 if answer["best"] else 1


def _question(args: argparse.Namespace) -> Question:
    from nemo_upcycle.data.dense import configuration_folder

    arch = read_architecture(configuration_folder(args.model))
    rope_kind(arch)  # training refuses another kind, too
    if arch.num_experts:
        fix = "name the dense model; of an MoE, `nemo-upcycle plan` says what training it costs"
        raise SpecError("--model", got=f"{arch.num_experts} experts", expected="a dense model", fix=fix)
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
    request = PlanRequest(
        arch=arch,
        gpu=gpu,
        gpus=args.gpus,
        work=work,
        tokens=args.tokens or 1.0,
        software=hardware.BRIDGE_SOFTWARE if gpu.is_blackwell else hardware.DEFAULT_SOFTWARE,
        usual=("dispatcher", "overlap"),
        price_per_gpu_hour=args.price_per_gpu_hour,
    )
    return Question(request, args.trained_on, args.hours)


def _specs(args: argparse.Namespace) -> list[UpcycleSpec]:
    """Return the specs: the first numbers of the three options make the first; one number alone is for all."""
    lists = [args.num_experts, args.top_k, args.granularity]
    count = max(map(len, lists))
    if any(len(numbers) not in (1, count) for numbers in lists):
        got = ", ".join(str(len(numbers)) for numbers in lists)
        fix = "give each as many numbers, or one for all: --experts 8,16 --top-k 2,4 --granularity 1,2"
        raise SpecError(
            "--experts, --top-k, --granularity", got=f"{got} numbers", expected="as many of each, or one", fix=fix
        )
    columns = [numbers * count if len(numbers) == 1 else numbers for numbers in lists]
    return [
        UpcycleSpec(num_experts=experts, top_k=top_k, granularity=parts, router_order=router_order(top_k))
        for experts, top_k, parts in zip(*columns, strict=True)
    ]


def _grid_law(path: str) -> Law:
    from nemo_upcycle.planning.law_fit import fit_law
    from nemo_upcycle.planning.upcycling_points import points_file, read_points

    return fit_law(read_points(path), "your own grid", str(points_file(path)))


def _text(
    args: argparse.Namespace,
    question: Question,
    options: Sequence[Option],
    laws: dict[str, Law],
    verdicts: dict[str, Verdict],
    answer: dict[str, Any],
) -> str:
    width = shutil.get_terminal_size().columns  # 80 without a terminal

    def folded(text: str) -> str:
        return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)

    budget = f"{args.hours:g} hours" if args.hours is not None else f"{short_count(args.tokens)} tokens"
    lines = [
        folded(
            f"A dense model of {short_count(question.parameters)} parameters, trained on"
            f" {short_count(args.trained_on)} tokens ({args.trained_on / question.parameters:,.0f} a parameter);"
            f" {budget} on {args.gpus} x"
            f" {question.request.gpu.name}, {args.precision}, natural routing."
        ),
        "",
        *_cost_table(options, answer["options"]),
        "",
        "Loss less that of `dense`, nats a token (90 % band):",
        *_loss_table(options, laws, answer["options"]),
        "",
    ]
    for name, law in laws.items():
        verdict = verdicts[name]
        lean = f" It leans to '{verdict.leans_to}'." if verdict.leans_to and not verdict.best else ""
        far = _beyond(name, answer["options"])
        lines.append(folded(f"{name}: {law.source} ({law.about}): {verdict.why}.{lean}{far}"))
        lines += [folded(f"{name}: {option} is left out: {why}.") for option, why in law.left_out.items()]
    for check in answer["checks"]:
        text = f"{check['measured']:+.3f} was measured ({check['source']}, {check['what']})"
        lines.append(folded(f"Where {text}, the published law says {check['predicted']:+.3f}."))
    if "fitted" not in laws:
        lines.append(folded("fitted: no law was fitted here yet; --grid fits one to your own trainings."))
    lines += ["", "Published, of parents that were trained long."]
    for reading, title in _READINGS.items():
        found = [outcome for outcome in answer["outcomes"] if outcome["reading"] == reading]
        lines += [title, *(folded(f"- {_parent(one)}: {one['said']} ({one['source']})") for one in found)]
    lines += ["", *map(folded, _verdict(args, answer["best"]))]
    return "\n".join(lines)


def _verdict(args: argparse.Namespace, best: str | None) -> list[str]:
    if best:
        return [f"Verdict: {best}. That is of the loss alone: weigh against it what serving costs."]
    if args.grid:
        return [
            "Verdict: not resolved by this grid. Add seeds, and parents whose tokens and size are nearer to yours, and"
            " run it again."
        ]
    return [
        "Verdict: not resolved. Run this grid first, with your data and, in a copy of conf/ablations/budget.yaml, a"
        " model and tokens near yours:",
        f"  {_GRID}",
        "then ask again with --grid runs/budget.",
    ]


def _parent(outcome: dict[str, Any]) -> str:
    tokens = outcome["parent_tokens"]
    return str(outcome["parent"]) + (f" after {short_count(tokens)} tokens" if tokens else "")


def _cost_table(options: Sequence[Option], values: dict[str, Any]) -> list[str]:
    has_price = values[options[0].name]["cost"] is not None
    costs = ["tokens", "hours", "GPU-hours", *(["cost"] if has_price else [])]
    rows = [["option", *costs, "GiB", "active", "total", "served"]]
    for option in options:
        value = values[option.name]
        cost = [f"{value['cost']:,.0f}"] if has_price else []
        cells = [short_count(value["tokens"]), f"{value['hours']:,.1f}", f"{value['gpu_hours']:,.0f}", *cost]
        if not option.fits:
            cells = ["no fit", *["-"] * (len(cells) - 1)]
        sizes = [short_count(value["active_parameters"]), short_count(value["total_parameters"])]
        rows.append(
            [option.name, *cells, f"{value['memory_gib']:.1f}", *sizes, f"{value['served_bytes'] / 1e9:,.3g} GB"]
        )
    return in_columns(rows, right=range(1, len(rows[0])))


def _loss_table(options: Sequence[Option], laws: dict[str, Law], values: dict[str, Any]) -> list[str]:
    rows = [["option", *laws]]
    rows += [[option.name, *(_difference(values[option.name][name]) for name in laws)] for option in options[1:]]
    return in_columns(rows, right=range(1, len(rows[0])))


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not known"
    if found["loss_difference"] is None:
        return "other size"
    band = found["band_90"]
    shown = f"{band[0]:+.3f} to {band[1]:+.3f}" if band else "no band"
    return f"{found['loss_difference']:+.3f} ({shown if found['near'] else 'too far out'})"


def _beyond(name: str, values: dict[str, Any]) -> str:
    """Return how far the options lie outside of a law's range."""
    ratios: dict[str, float] = {}
    for option in values.values():
        for what, ratio in (option[name] or {"beyond": {}})["beyond"].items():
            ratios[what] = max(ratio, ratios.get(what, 1))
    far = [f"{what} {ratio_text(ratio)}x" for what, ratio in ratios.items() if ratio >= 1.05]
    return f" Beyond its range: {', '.join(far)}." if far else ""
