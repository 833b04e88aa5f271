"""`nemo-upcycle convert`: turn a checkpoint into an MoE Hugging Face folder, without a training job."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING

from nemo_upcycle.cli.common import (
    add_dtype,
    add_no_proof,
    add_spec_options,
    file_size,
    folder_to_make,
    show,
    used_spec,
)
from nemo_upcycle.spec import UpcycleSpec


if TYPE_CHECKING:
    from nemo_upcycle.convert.offline import Conversion
    from nemo_upcycle.convert.proof import Proof

EPILOG = """examples:
  nemo-upcycle convert asset://smollm2-135m runs/smollm2-e8t2 --experts 8 --top-k 2
  nemo-upcycle convert models/Llama-3-8B models/fine --experts 16 --top-k 4 --granularity 2 --shared-experts 1
  nemo-upcycle convert models/base models/mixed --branch models/code --branch models/law --non-expert-weights mean
  nemo-upcycle convert hf://meta-llama/Meta-Llama-3-8B models/Llama-3-8B-E8T2 --max-shard-size 2GB

The result is bit-identical to upcycling in the training job. Run the same command again to continue a stopped
conversion. At the end, the written folder and its parent run in the installed transformers on random tokens. The
result is shown, and written to the model card and to nemo_upcycle.json.
exit status: 0 done; 1 written, but it does not run, or differs from its parent without a known reason; 2 wrong value
or file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    text = "dense model or MoE: Hugging Face folder, hf://ORG/NAME on the hub (downloaded), or asset://smollm2-135m"
    parser.add_argument("source", metavar="SRC", help=text)
    parser.add_argument("output", metavar="DST", type=folder_to_make, help="folder to make")
    add_spec_options(parser)
    branches = parser.add_argument_group("several dense models (Branch-Train-MiX)")
    branches.add_argument(
        "--branch", action="append", default=[], metavar="SRC", help="another model whose networks become experts"
    )
    branches.add_argument(
        "--non-expert-weights",
        default="first",
        metavar="first|mean",
        help="source of the other weights: the first model, or the mean of all (default: first)",
    )
    add_dtype(parser)
    parser.add_argument(
        "--text-only", action="store_true", help="with a vision-language model: write only the text model"
    )
    parser.add_argument(
        "--max-shard-size",
        type=file_size,
        default="5GB",
        metavar="SIZE",
        help="largest safetensors file, such as 500MB; a stopped conversion keeps finished files (default: 5GB)",
    )
    add_no_proof(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    spec = UpcycleSpec(**used_spec(args))
    from nemo_upcycle.convert.offline import convert
    from nemo_upcycle.convert.proof import prove, record
    from nemo_upcycle.sources.fetch import local_model
    from nemo_upcycle.sources.resolve import check_non_expert_weights, open_dense

    check_non_expert_weights(args.non_expert_weights)
    sources = [local_model(source, nemo=True) for source in (args.source, *args.branch)]
    with open_dense(sources, non_expert_weights=args.non_expert_weights) as dense:
        size, text_only = args.max_shard_size, args.text_only
        done = convert(dense, args.output, spec, dtype=args.dtype, max_shard_bytes=size, text_only=text_only)
    expected = "; ".join(done.inexact_because)
    proof = None if args.no_proof else prove(done.output, None if args.branch else dense.path)
    if proof:
        record(done.output, proof, expected)
    show(args, asdict(done) | {"proof": asdict(proof) if proof else None}, _text(done, str(dense.path), proof))
    return 1 if proof and (proof.outcome == "failed" or (done.exact and proof.outcome == "different")) else 0


def _text(done: Conversion, source: str, proof: Proof | None) -> str:
    from nemo_upcycle.convert.proof import said

    lines = [
        f"{done.output}: {done.hf_class}, {done.total_params / 1e9:.4g}B parameters ({done.active_params / 1e9:.4g}B"
        f" active), {done.dtype}, {done.bytes_total / 1e9:.4g} GB in {done.seconds:.3g} s",
        said(proof, "; ".join(done.inexact_because)),
    ]
    if done.needs_float32_routing:
        lines.append(
            "needs router logits in float32: in 16 bits, two networks can have equal logits, and top-k then mixes them"
            " (nemo-upcycle verify counts such tokens)"
        )
    if done.left_out:
        from nemo_upcycle.sources.base import left_out_text

        why = f": {done.unseen_because}" if done.unseen_because else ""
        lines.append(f"only the text model, without {left_out_text(done.left_out)}{why}")
    lines += [f"not for every server: {caveat}" for caveat in done.caveats]
    if done.files_kept:
        lines.append(
            f"{done.files_kept} of {done.files} files kept from before, with the right size and header; to check their"
            f" content: `nemo-upcycle verify {shlex.quote(source)} {shlex.quote(str(done.output))} --weights-only`"
        )
    return "\n".join(lines)
