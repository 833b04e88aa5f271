"""`nemo-upcycle convert`: a dense checkpoint becomes an MoE Hugging Face folder, without a training job."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from nemo_upcycle.commands.common import add_dtype, add_json, add_spec_options, dtype_of, given_spec, show
from nemo_upcycle.errors import SpecError, problem
from nemo_upcycle.spec import UpcycleSpec


HELP = "dense checkpoint -> MoE Hugging Face folder: Mixtral, or Qwen2-MoE where only that can hold the model"
_EXAMPLES = """examples:
  nemo-upcycle convert models/Llama-3-8B models/Llama-3-8B-E8T2 --experts 8 --top-k 2
  nemo-upcycle convert models/Llama-3-8B models/fine --experts 16 --top-k 4 --granularity 2 --shared-experts 1
  nemo-upcycle convert models/base models/mixed --branch models/code --branch models/law --others mean

The bits are those of upcycling in the training job. Stopped, it goes on when it is run again.
exit status: 0 done; 2 a value or a file is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = _EXAMPLES
    parser.add_argument("source", metavar="SRC", help="dense checkpoint: Hugging Face folder, or hf:///... address")
    parser.add_argument("output", metavar="DST", type=Path, help="folder to make")
    add_spec_options(parser)
    branches = parser.add_argument_group("several dense models (Branch-Train-MiX)")
    branches.add_argument(
        "--branch", action="append", default=[], metavar="SRC", help="a further model whose networks become experts"
    )
    branches.add_argument("--others", default="first", metavar="first|mean", help="where the rest comes from")
    add_dtype(parser, "the source's")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, tell what was made, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    given, dtype = given_spec(args), dtype_of(args.dtype)
    spec = UpcycleSpec(**given)
    for name, method in (("noise_std", "noise"), ("drop_ratio", "drop")):
        if name in given and spec.method != method:
            option, fix = f"--{name.replace('_', '-')}", f"add --method {method}, or leave it away"
            raise SpecError(problem(option, got=given[name], expected=f"it with --method {method} only", fix=fix))
    from nemo_upcycle.offline import Conversion, convert
    from nemo_upcycle.sources import open_dense

    with open_dense([args.source, *args.branch], others=args.others) as dense:
        done: Conversion = convert(dense, args.output, spec, dtype=dtype)
    kept = f", {done.files_kept} of {done.files} files from before" if done.files_kept else ""
    faithful = "computes the dense function" if done.exact else "not exact: " + "; ".join(done.inexact_because)
    text = (
        f"{done.output}: {done.hf_class}, {done.total_params / 1e9:.4g}B parameters ({done.active_params / 1e9:.4g}B"
        f" active), {done.dtype}, {done.bytes_total / 1e9:.4g} GB in {done.seconds:.3g} s{kept}\n"
        f"{faithful}"
    )
    show(args, asdict(done), text)
    return 0
