"""`nemo-upcycle export`: a NeMo or Megatron checkpoint becomes a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_upcycle.commands.common import add_dtype, add_json, add_spec_options, dtype_of, given_spec, show
from nemo_upcycle.errors import UpcycleError, problem
from nemo_upcycle.files import MARKER, read_json
from nemo_upcycle.receipt import read_receipt, spec_of


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
    path = args.receipt or _nearest_receipt(args.checkpoint)
    receipt = read_receipt(path) if path else {}
    spec = spec_of(receipt, path, given_spec(args))
    dense = args.dense or (Path(receipt["source"]) if isinstance(receipt.get("source"), str) else None)
    if dense is None:
        fix = "add --dense FOLDER, or --receipt FILE of the run"
        raise UpcycleError(problem("dense parent", got="none", expected="its Hugging Face folder", fix=fix))
    dtype = dtype_of(args.dtype or "bfloat16")
    from nemo_upcycle.export import export_checkpoint

    assert dtype is not None
    folder = export_checkpoint(args.checkpoint, dense, args.output, spec=spec, dtype=dtype)
    marker = read_json(folder / MARKER)
    config = read_json(folder / "config.json")
    answer = {"output": folder, "hf_class": config["architectures"][0], "dense": dense, **marker}
    show(args, answer, f"{folder}: {answer['hf_class']}, {marker['tensors']} tensors, {marker['bytes'] / 1e9:.4g} GB")
    return 0


def _nearest_receipt(checkpoint: Path) -> Path | None:
    """Return the receipt in the nearest folder above the checkpoint that has one."""
    paths = (folder / _RECEIPT for folder in list(checkpoint.resolve().parents)[:6])
    return next((path for path in paths if path.is_file()), None)
