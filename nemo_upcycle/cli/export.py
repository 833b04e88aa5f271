"""`nemo-upcycle export`: turn a NeMo or Megatron checkpoint into a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nemo_upcycle.cli.common import (
    add_dtype,
    add_json,
    add_spec_options,
    folder_to_make,
    given_spec,
    show,
)
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.online.receipt import read_receipt, spec_of
from nemo_upcycle.utils.files import MODEL_MARKER, read_json


HELP = "NeMo or Megatron checkpoint, saved under any layout -> Hugging Face folder"
_EXAMPLES = """examples:
  nemo-upcycle export runs/demo hf-demo
  nemo-upcycle export runs/demo/pretrain/checkpoints/last hf-last
  nemo-upcycle export checkpoints/step=1000 hf --dense models/Llama-3-8B

Given a run or a folder of checkpoints, the command exports the newest complete one. The specification and the parent
come from the run's receipt.json, found above the checkpoint, and from the checkpoint's own context/; --dense and the
options must agree with both. The weights are the model's own, not the optimizer's float32 copy.
exit status: 0 done; 2 a value or a file is wrong."""
_RECEIPT = "receipt.json"
#: Fields that no tensor shows and that every reader needs.
_UNSEEN = ("top_k", "router_order")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", type=Path, help="folder with weights/ or .metadata, or a folder above it"
    )
    parser.add_argument("output", metavar="DST", type=folder_to_make, help="folder to make")
    parser.add_argument("--dense", type=Path, metavar="FOLDER", help="the dense parent (default: from the receipt)")
    parser.add_argument(
        "--receipt", type=Path, metavar="FILE", help="receipt.json of the run (default: search above CHECKPOINT)"
    )
    add_spec_options(parser, "how the model was upcycled (default: from receipt and checkpoint)", defaults=False)
    add_dtype(parser, "bfloat16")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Export, show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    checkpoint = find_checkpoint(args.checkpoint)
    path = args.receipt or _nearest_receipt(checkpoint)
    receipt = read_receipt(path) if path else {}
    dense = args.dense or (Path(receipt["source"]) if isinstance(receipt.get("source"), str) else None)
    if dense is None:
        raise UpcycleError(
            "dense parent",
            got="none",
            expected="its Hugging Face folder",
            fix="add --dense FOLDER, or --receipt FILE of the run",
        )
    from nemo_upcycle.convert.export import About, export_checkpoint
    from nemo_upcycle.sources.checkpoint_context import read_context

    context, given = read_context(checkpoint), given_spec(args)
    if not (context or receipt.get("spec")) and given:
        _require_unseen(given, checkpoint)
    known = {name: value for name, (_, value) in context.spec_fields.items()} if context else {}
    spec = spec_of(receipt.get("spec"), path, given, known)
    about = About(facts=_facts(receipt, path, checkpoint))
    folder = export_checkpoint(checkpoint, dense, args.output, spec=spec, dtype=args.dtype, about=about)
    marker = read_json(folder / MODEL_MARKER)
    config = read_json(folder / "config.json")
    answer = {
        "output": folder,
        "hf_class": config["architectures"][0],
        "dense": dense,
        "checkpoint_folder": checkpoint,
        **marker,
    }
    lines = [f"{folder}: {answer['hf_class']}, {marker['tensors']} tensors, {marker['bytes'] / 1e9:.4g} GB"]
    lines += [f"from {checkpoint}", *marker["rounded"], *marker["notes"]]
    show(args, answer, "\n".join(lines))
    return 0


def _facts(receipt: dict[str, Any], path: Path | None, checkpoint: Path) -> dict[str, str]:
    """Return facts for the model card from the run's folder."""
    from nemo_upcycle.convert.model_card import spec_fact, training_facts
    from nemo_upcycle.sources.checkpoints import step_of

    spec, step = spec_of(receipt.get("spec"), path, {}), step_of(checkpoint)
    training = training_facts(path.parent / "metrics.jsonl", step + 1) if path and step is not None else {}
    return (spec_fact(spec) if spec else {}) | training


def _require_unseen(given: dict[str, Any], checkpoint: Path) -> None:
    if missing := [f"--{name.replace('_', '-')}" for name in _UNSEEN if name not in given]:
        raise SpecError(
            f"router of {checkpoint}",
            got="neither a context/, arguments in common.pt nor a receipt",
            expected="what no tensor shows",
            fix=f"add {' and '.join(missing)}, or --receipt FILE of the run",
        )


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`, the newest of a folder or run, or the last for `.../last`.

    Raises:
        CheckpointError: there is no complete checkpoint, or several runs have some.
    """
    from nemo_upcycle.sources.checkpoints import (  # imports torch, which --help does not need
        UNFINISHED,
        complete_checkpoints,
        is_marked,
    )

    if _is_checkpoint(path):
        if is_marked(path):
            raise CheckpointError(
                str(path),
                got=f"one that is being written or removed ({path.name}{UNFINISHED})",
                expected="a finished checkpoint",
                fix="name another checkpoint",
            )
        return path
    if path.name == "last" and not path.exists() and path.parent.is_dir():
        ends = [found for found in complete_checkpoints(path.parent) if found.name.endswith("-last")]
        if ends:
            return ends[-1]
        path = path.parent
    if not path.is_dir():
        raise CheckpointError(
            str(path), got="no such folder", expected="a checkpoint, a folder of them, or a run", fix="check the path"
        )
    # A run of the pipeline has a folder of checkpoints for the upcycled model and one for its dense baseline.
    near = [path, path / "checkpoints", path / "pretrain/checkpoints"]
    deep = sorted(folder for depth in ("*", "*/*") for folder in path.glob(f"{depth}/checkpoints"))
    found = [complete for folder in near if folder.is_dir() and (complete := complete_checkpoints(folder))][:1]
    found = found or [complete for folder in deep if (complete := complete_checkpoints(folder))]
    if len(found) == 1:
        return found[0][-1]
    children = [str(one[-1].relative_to(path)) for one in found] or sorted(child.name for child in path.iterdir())
    raise CheckpointError(
        str(path),
        got=f"{'several' if found else 'no complete checkpoint'} ({', '.join(children[:8]) or 'an empty folder'})",
        expected="a finished checkpoint, a folder of them, or a run",
        fix="name the checkpoint",
    )


def _is_checkpoint(path: Path) -> bool:
    return any((folder / ".metadata").is_file() for folder in (path, path / "weights"))


def _nearest_receipt(checkpoint: Path) -> Path | None:
    """Return the receipt in the nearest folder above the checkpoint that has one."""
    paths = (folder / _RECEIPT for folder in list(checkpoint.resolve().parents)[:6])
    return next((path for path in paths if path.is_file()), None)
