"""`nemo-upcycle export`: turn a NeMo or Megatron checkpoint into a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nemo_upcycle.cli.common import add_dtype, add_no_proof, add_spec_options, folder_to_make, given_spec, show
from nemo_upcycle.online.receipt import recorded_spec
from nemo_upcycle.utils.files import MODEL_MARKER, read_json


EPILOG = """examples:
  nemo-upcycle export runs/demo hf-demo
  nemo-upcycle export runs/demo/pretrain/checkpoints/last hf-last
  nemo-upcycle export checkpoints/step=1000 hf --dense models/Llama-3-8B

Given a run or a folder of checkpoints, the command exports the newest finished checkpoint. Spec and parent come from
the run's receipt.json and from the checkpoint's own context/. If you give --dense or options, they must agree with
these. The exported weights are the model's own, not the optimizer's float32 copy. At the end, the folder runs in the
installed transformers on random tokens.
exit status: 0 done; 1 written, but it does not run; 2 wrong value or file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="checkpoint folder (with weights/ or .metadata), or a folder above it",
    )
    parser.add_argument("output", metavar="DST", type=folder_to_make, help="folder to make")
    parser.add_argument("--dense", type=Path, metavar="FOLDER", help="the parent (default: from the receipt)")
    parser.add_argument(
        "--receipt", type=Path, metavar="FILE", help="receipt.json of the run (default: search above CHECKPOINT)"
    )
    add_spec_options(parser, "how the model was upcycled (default: from receipt and checkpoint)", defaults=False)
    add_dtype(parser, "bfloat16")
    parser.add_argument(
        "--text-only", action="store_true", help="with a vision-language parent: write only the text model"
    )
    add_no_proof(parser)


def run(args: argparse.Namespace) -> int:
    """Export, show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    from nemo_upcycle.convert.export import CardInfo, export_checkpoint
    from nemo_upcycle.convert.found import find_trained_model
    from nemo_upcycle.convert.proof import prove, record, said

    model = find_trained_model(args.checkpoint, args.dense, args.receipt, given_spec(args))
    about = CardInfo(facts=_facts(model.receipt, model.receipt_path, model.checkpoint), text_only=args.text_only)
    folder = export_checkpoint(
        model.checkpoint, model.dense, args.output, spec=model.spec, dtype=args.dtype, about=about
    )
    proof = None if args.no_proof else prove(folder, None)
    if proof:
        record(folder, proof)
    marker = read_json(folder / MODEL_MARKER)
    config = read_json(folder / "config.json")
    answer = {
        "output": folder,
        "hf_class": config["architectures"][0],
        "dense": model.dense,
        "checkpoint_folder": model.checkpoint,
        **marker,
    }
    lines = [f"{folder}: {answer['hf_class']}, {marker['tensors']} tensors, {marker['bytes'] / 1e9:.4g} GB"]
    lines += [f"from {model.checkpoint}", *marker["rounded"], *marker["notes"]]
    lines += [said(proof)] if proof else []
    show(args, answer, "\n".join(lines))
    return 1 if proof and proof.outcome == "failed" else 0


def _facts(receipt: dict[str, Any], path: Path | None, checkpoint: Path) -> dict[str, str]:
    """Collect facts for the model card from the run's folder."""
    from nemo_upcycle.convert.model_card import spec_fact, training_facts
    from nemo_upcycle.sources.checkpoints import steps_in

    spec = recorded_spec(receipt.get("spec"), path, {})
    training = training_facts(path.parent / "metrics.jsonl", steps_in(checkpoint)) if path else {}
    return (spec_fact(spec) if spec else {}) | training
