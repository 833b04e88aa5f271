"""The folder of a run's checkpoints and its receipt, on a disk or in an object store that Bridge writes to."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from megatron.bridge.training.utils.checkpoint_utils import file_exists, join_paths
from megatron.core.msc_utils import MultiStorageClientFeature

from nemo_upcycle.errors import SpecError
from nemo_upcycle.online.receipt import UpcycleReceipt, read_receipt
from nemo_upcycle.sources.checkpoints import last_finished, set_aside, step_of
from nemo_upcycle.sources.checksums import trusted_checkpoint, write_checksums


RECEIPT = "receipt.json"


def check_folder(folder: str) -> None:
    """Check that Bridge can write to a folder; an object store works only through Megatron's MultiStorageClient.

    Raises:
        SpecError: Bridge cannot write to the folder.
    """
    if _is_in_store(folder) and not (folder.startswith("msc://") and MultiStorageClientFeature.is_enabled()):
        raise SpecError(
            field="config.checkpoint.save",
            got=folder,
            expected="a folder, or msc://PROFILE/PATH if Megatron's MultiStorageClient is on",
            fix="give a folder, or call megatron.core.msc_utils.MultiStorageClientFeature.enable() first",
        )


def same_folder(one: str, other: str) -> bool:
    """Return whether two names refer to the same folder."""
    if _is_in_store(one) or _is_in_store(other):
        return one.rstrip("/") == other.rstrip("/")
    return Path(one).resolve() == Path(other).resolve()


def save_receipt(receipt: UpcycleReceipt, folder: str) -> None:
    """Write the receipt beside the checkpoints, before the first checkpoint."""
    if not _is_in_store(folder):
        receipt.write(Path(folder) / RECEIPT)
        return
    with MultiStorageClientFeature.import_package().open(join_paths(folder, RECEIPT), "w") as file:
        json.dump(receipt.to_dict(), file, indent=2)


def load_receipt(folder: str) -> dict[str, Any] | None:
    """Return the receipt beside a run's checkpoints; None if there is no receipt.

    Raises:
        UpcycleError: the file is not a receipt.
    """
    path = join_paths(folder, RECEIPT)
    if not file_exists(path):
        return None
    if not _is_in_store(folder):
        return read_receipt(Path(path))
    with TemporaryDirectory() as temporary:
        copy = Path(temporary) / RECEIPT
        with MultiStorageClientFeature.import_package().open(path, "r") as file:
            copy.write_text(file.read(), encoding="utf-8")
        return read_receipt(copy)


def load_trusted(checkpoint: Any) -> None:
    """Let Bridge load an earlier checkpoint if files of the last one are damaged. All ranks of a run call this.

    Args:
        checkpoint: Bridge's configuration of checkpoints. Its `ckpt_step` is set if the last checkpoint is damaged.

    Raises:
        CheckpointError: every checkpoint is damaged.
    """
    if checkpoint.ckpt_step is not None or _is_in_store(checkpoint.load):
        return
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def gather(value: Any) -> list[Any]:
        values = [None] * ranks
        torch.distributed.all_gather_object(values, value)
        return values

    chosen = trusted_checkpoint(Path(checkpoint.load), set_aside, rank=rank, ranks=ranks, gather=gather)
    if chosen and step_of(chosen) != last_finished(chosen.parent):
        checkpoint.ckpt_step = step_of(chosen)


def save_checksums(folder: str) -> None:
    """Write the checksums of this rank's files in the checkpoint that Bridge has just finished."""
    if _is_in_store(folder):
        return
    checkpoint = Path(folder) / f"iter_{last_finished(Path(folder)):07d}"  # training may be some steps further
    if checkpoint.is_dir():
        write_checksums(checkpoint, torch.distributed.get_rank())


def _is_in_store(folder: str) -> bool:
    return "://" in folder
