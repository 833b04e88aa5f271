"""Find a checkpoint at a user's path, and read its parent and spec from the run's receipt and the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.online.receipt import read_receipt, recorded_spec
from nemo_upcycle.sources.checkpoint_context import CheckpointContext, read_context
from nemo_upcycle.sources.checkpoints import UNFINISHED, complete_checkpoints, is_marked
from nemo_upcycle.spec import UpcycleSpec


_RECEIPT = "receipt.json"
#: Spec fields that every reader needs, although no tensor shows them.
_UNSEEN = ("top_k", "router_order")


@dataclass(frozen=True)
class FoundModel:
    """A checkpoint and its origin.

    Args:
        checkpoint: folder with `weights/` or `.metadata`.
        dense: Hugging Face folder of the dense parent.
        spec: how the model was upcycled; None for a dense model.
        receipt_path: receipt of the checkpoint's run, or None.
        receipt: content of the receipt.
    """

    checkpoint: Path
    dense: Path
    spec: UpcycleSpec | None
    receipt_path: Path | None
    receipt: dict[str, Any]


def find_trained_model(
    path: Path, dense: Path | None = None, receipt_path: Path | None = None, given: dict[str, Any] | None = None
) -> FoundModel:
    """Return the checkpoint at a path, with its parent and its spec.

    Args:
        path: a checkpoint, a folder of checkpoints, or a run, as in `find_checkpoint`.
        dense: folder of the dense parent; None to use the folder in the receipt.
        receipt_path: receipt of the run; None to use the nearest receipt above the checkpoint, or else the receipt of
            the run from which a fine-tuning started.
        given: spec fields that the user states.

    Raises:
        UpcycleError: there is no such checkpoint or receipt, no parent is known, or the statements contradict each
            other.

    Example:
        >>> find_trained_model(Path("runs/demo")).dense  # doctest: +SKIP
        PosixPath('runs/demo/dense')
    """
    checkpoint, given = find_checkpoint(path), given or {}
    context = read_context(checkpoint)
    receipt_path = receipt_path or _nearest_receipt(checkpoint) or _receipt_of_source(context)
    receipt = read_receipt(receipt_path) if receipt_path else {}
    dense = dense or (Path(receipt["source"]) if isinstance(receipt.get("source"), str) else None)
    if dense is None:
        raise UpcycleError(
            "The parent", kind="missing", got="is missing", fix="add --dense FOLDER, or --receipt FILE of the run"
        )
    if not (context or receipt.get("spec")) and given:
        _require_unseen(given, checkpoint)
    known: dict[str, Any] = {}
    if context:
        parent = read_architecture(dense) if (dense / "config.json").is_file() else None
        fields = context.spec_fields_of(parent) if parent else context.spec_fields
        known = {name: value for name, (_, value) in fields.items()}
    spec = recorded_spec(receipt.get("spec"), receipt_path, given, known)
    return FoundModel(checkpoint, dense, spec, receipt_path, receipt)


def _require_unseen(given: dict[str, Any], checkpoint: Path) -> None:
    if missing := [f"--{name.replace('_', '-')}" for name in _UNSEEN if name not in given]:
        raise SpecError(
            f"Checkpoint {checkpoint}",
            kind="missing",
            got="does not describe its router: it has no context/, no arguments in common.pt and no receipt",
            fix=f"add {' and '.join(missing)}, or --receipt FILE of the run",
        )


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint at `path`, or the newest checkpoint in this folder or run.

    `FOLDER/last` stands for the last checkpoint in FOLDER.

    Raises:
        CheckpointError: there is no complete checkpoint, or several runs have a checkpoint.
    """
    if any((folder / ".metadata").is_file() for folder in (path, path / "weights")):
        if is_marked(path):
            raise CheckpointError(
                f"Checkpoint {path}",
                kind="state",
                got=f"is being written or removed ({path.name}{UNFINISHED})",
                fix="name another checkpoint",
            )
        return path
    if path.name == "last" and not path.exists() and path.parent.is_dir():
        ends = [found for found in complete_checkpoints(path.parent) if found.name.endswith("-last")]
        if ends:
            return ends[-1]
        path = path.parent
    if not path.is_dir():
        raise CheckpointError.no_path("folder", path, "give a checkpoint, a folder of checkpoints, or a run")
    # A pipeline run has one folder of checkpoints for the upcycled model and another for its dense baseline.
    near = [path, path / "checkpoints", path / "pretrain/checkpoints"]
    deep = sorted(folder for depth in ("*", "*/*") for folder in path.glob(f"{depth}/checkpoints"))
    found = [complete for folder in near if folder.is_dir() and (complete := complete_checkpoints(folder))][:1]
    found = found or [complete for folder in deep if (complete := complete_checkpoints(folder))]
    if len(found) == 1:
        return found[0][-1]
    children = [str(one[-1].relative_to(path)) for one in found] or sorted(child.name for child in path.iterdir())
    raise CheckpointError(
        str(path),
        kind="state",
        got=(
            f"has {('several checkpoints' if found else 'no finished checkpoint')} "
            f"({', '.join(children[:8]) or 'an empty folder'})"
        ),
        fix="name one checkpoint, a folder of checkpoints, or a run",
    )


def _receipt_of_source(context: CheckpointContext | None) -> Path | None:
    """Return the receipt of the upcycled run from which a fine-tuning in Megatron-Bridge started."""
    source = context.settings.get("started_from") if context else None
    path = Path(source) / _RECEIPT if source else None
    return path if path and path.is_file() else None


def _nearest_receipt(checkpoint: Path) -> Path | None:
    """Return the receipt in the nearest folder above the checkpoint, or None if there is no receipt."""
    paths = (folder / _RECEIPT for folder in list(checkpoint.resolve().parents)[:6])
    return next((path for path in paths if path.is_file()), None)
