"""`nemo-upcycle verify`: compare a dense model with the MoE model made from it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_upcycle.cli.common import show
from nemo_upcycle.errors import UpcycleError


if TYPE_CHECKING:
    from nemo_upcycle.convert.verification import Verification

EPILOG = """examples:
  nemo-upcycle verify runs/demo/dense runs/demo/upcycle/hf --layers
  nemo-upcycle verify models/Llama-3-8B models/Llama-3-8B-E8T2 --weights-only

Logits are compared in float32, with streamed weights. With granularity, or with copied experts of a parent, the
command also counts the tokens whose routing mixes networks in the model's own type. Such a model needs float32
routing, which the verdict assumes.
exit status: 0 equal up to rounding; 1 different; 2 damaged folder or wrong value."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    where = "Hugging Face folder, or hf://ORG/NAME on the hub (downloaded)"
    parser.add_argument("dense", metavar="DENSE", help=f"the parent: {where}, or asset://smollm2-135m")
    parser.add_argument("moe", metavar="MOE", help=f"the MoE model: {where}")
    parser.add_argument(
        "--layers", action="store_true", help="also compare every layer, to find where the models diverge"
    )
    parser.add_argument(
        "--weights-only", action="store_true", help="compare the weights only, without running the models"
    )
    text = "with a parent that has experts: the file that says which experts have more copies"
    parser.add_argument("--expert-utility", metavar="FILE", type=Path, help=text)


def run(args: argparse.Namespace) -> int:
    """Compare, show the result, and return the exit status.

    Raises:
        UpcycleError: a folder is damaged or a value is wrong.
    """
    if args.weights_only and args.layers:
        raise UpcycleError(
            "--weights-only",
            kind="refused",
            got="cannot be combined with --layers, because --weights-only does not run the models",
            fix="omit one of them",
        )
    from nemo_upcycle.convert.verification import verify
    from nemo_upcycle.sources.fetch import local_model

    dense, moe = (Path(local_model(source)) for source in (args.dense, args.moe))
    result = verify(
        dense,
        moe,
        layers=args.layers,
        logits=not args.weights_only,
        expert_utility=args.expert_utility,
    )
    show(args, asdict(result), _text(result))
    return 0 if result.equal else 1


def _text(result: Verification) -> str:
    lines = [f"{result.moe}: {result.hf_class}, of {result.dense}", "weights", *map(str, result.weights)]
    verdict = "as copies, exact" if result.weights_exact else "not those of an exact upcycling"
    lines.append("; ".join([f"  {verdict}", *result.weights_rounded]))
    if logits := result.logits:
        lines += [
            f"logits of {logits.tokens} tokens, float32",
            f"  largest difference {logits.max_abs:.3g}, mean {logits.mean_abs:.3g},"
            f" relative {logits.relative:.3g} (tolerance {result.tolerance:g})",
            f"  same likeliest token: {100 * logits.same_argmax:.4g} %",
        ]
        if logits.layer_relative:
            names = ["embedding", *(f"layer {number}" for number in range(len(logits.layer_relative) - 1))]
            lines.append("difference after")
            lines += [f"  {name:<10}{value:.3g}" for name, value in zip(names, logits.layer_relative, strict=True)]
    if result.granularity > 1 or result.torn:
        lines.append(f"routing: {_routing(result)}")
    lines.append("equal: " + ("yes" if result.equal else "no"))
    return "\n".join(lines)


def _routing(result: Verification) -> str:
    torn = result.torn
    if torn is None:
        return "top-k picks whole copies only if router logits are float32; omit --weights-only to count the rest"
    if not torn.torn:
        return f"in {torn.dtype}, all {torn.tokens} tokens get whole networks"
    share = f"{torn.torn} of {torn.tokens} tokens ({100 * torn.share:.2g} %) get parts of several networks"
    return f"in {torn.dtype}, {share}; serve this model with router logits in float32, for which the verdict holds"
