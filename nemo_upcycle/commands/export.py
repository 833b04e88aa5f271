"""`nemo-upcycle export`: a NeMo or Megatron checkpoint becomes a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nemo_upcycle.commands.common import (
    add_dtype,
    add_json,
    add_spec_options,
    dtype_of,
    given_spec,
    require_free,
    show,
)
from nemo_upcycle.errors import UpcycleError, problem
from nemo_upcycle.files import MARKER, read_json
from nemo_upcycle.spec import UpcycleSpec


HELP = "NeMo or Megatron checkpoint, saved under any layout -> Hugging Face folder"
_EXAMPLES = """examples:
  nemo-upcycle export runs/demo/pretrain/checkpoints/last runs/demo/hf-last
  nemo-upcycle export checkpoints/last hf --dense models/Llama-3-8B --experts 8 --top-k 2

What the model was upcycled by stands in the run's receipt.json, which is looked for above the checkpoint.
exit status: 0 done; 2 a value or a file is wrong."""
_RECEIPT = "receipt.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = _EXAMPLES
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder with weights/ or .metadata")
    parser.add_argument("output", metavar="DST", type=Path, help="folder to make")
    parser.add_argument("--dense", type=Path, metavar="FOLDER", help="the dense parent (default: the receipt's)")
    parser.add_argument("--receipt", type=Path, metavar="FILE", help="receipt.json of the run (default: looked for)")
    add_spec_options(parser)
    add_dtype(parser, "bfloat16")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export, tell what was made, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    receipt = _receipt(args)
    given = given_spec(args)
    spec = UpcycleSpec(**((receipt.get("spec") or {}) | given)) if given or receipt.get("spec") else None
    dense = args.dense or (Path(receipt["source"]) if receipt.get("source") else None)
    if dense is None:
        fix = "add --dense FOLDER, or --receipt FILE of the run"
        raise UpcycleError(problem("dense parent", got="none", expected="its Hugging Face folder", fix=fix))
    require_free(args.output)
    dtype = dtype_of(args.dtype or "bfloat16")
    from nemo_upcycle.export import export_checkpoint

    assert dtype is not None
    folder = export_checkpoint(args.checkpoint, dense, args.output, spec=spec, dtype=dtype)
    marker = read_json(folder / MARKER)
    config = read_json(folder / "config.json")
    answer = {"output": folder, "hf_class": config["architectures"][0], "dense": dense, **marker}
    show(args, answer, f"{folder}: {answer['hf_class']}, {marker['tensors']} tensors, {marker['bytes'] / 1e9:.4g} GB")
    return 0


def _receipt(args: argparse.Namespace) -> dict[str, Any]:
    """Return the receipt that was named, else the nearest one in a folder above the checkpoint; empty without one."""
    if args.receipt:
        return dict(read_json(args.receipt))
    for folder in list(args.checkpoint.resolve().parents)[:6]:
        if (folder / _RECEIPT).is_file():
            return dict(read_json(folder / _RECEIPT))
    return {}
