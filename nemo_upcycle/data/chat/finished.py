"""Read a finished folder of conversations; `open_data` opens a folder of texts or of conversations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.chat.config import KIND, is_chat
from nemo_upcycle.data.finished import HELDOUT, Finished, FinishedBlend, open_blend
from nemo_upcycle.data.indexed_dataset import require_size
from nemo_upcycle.errors import UpcycleError


#: Format version of the manifest, and the names of the folder's files.
FORMAT = 1
PACKS = {"train": "training.npy", "validation": "validation.npy"}
PACKING, REMOVED = "packing.json", "removed.jsonl"


@dataclass(frozen=True)
class FinishedChat(Finished):
    """A finished folder of conversations."""

    kind, format, key, command = KIND, FORMAT, "chat", "nemo-upcycle chat"

    @property
    def card(self) -> str:
        """Describe the data for a model card."""
        train = self.manifest["splits"]["train"]
        return (
            f"conversations {self.name}, {train['conversations']:,} with {train['answers']:,} answers of"
            f" {train['answer_tokens']:,} tokens to train on ({self.manifest['license']})"
        )

    @property
    def files(self) -> list[str]:
        """List the files that trainings and evaluations read, relative to the folder."""
        return [*PACKS.values(), HELDOUT]

    @property
    def held_out(self) -> dict[str, Any]:
        """Return the held-out answers as arguments of `build_named_suite`.

        Each answer has `document`, `turn`, `prompt` and `answer`.
        """
        return {"heldout_documents": [], "answers": self.lines()}

    def validation_tokens(self) -> Iterator[Any]:
        """Yield the token ids of each pack: validation first, then training, because validation packs are few."""
        import numpy as np

        for split in ("validation", "train"):
            yield from (row["input_ids"] for row in np.load(self.folder / PACKS[split], allow_pickle=True))

    def require_length(self, seq_length: int) -> None:
        """Check that the packs in this folder have the length that a run expects.

        Raises:
            UpcycleError: the lengths differ.
        """
        if seq_length != (made := self.manifest["seq_length"]):
            raise UpcycleError(
                "data.seq_length",
                got=seq_length,
                expected=f"{made}, as in the packs of {self.folder}",
                fix=f"set it to {made}, or build a folder with the training's seq_length",
            )

    def describe(self, steps: int, step_packs: int) -> str:
        """Describe how much of the folder a run reads.

        Args:
            steps: steps of the run.
            step_packs: packs in a step, over all ranks.
        """
        packs = self.manifest["splits"]["train"]["packs"]
        return f"data: {self.card}, in {packs:,} packs; {steps} steps read {steps * step_packs / packs:.2f} epochs"


def open_chat(folder: str | Path) -> FinishedChat:
    """Read the manifest of a finished folder of conversations, and compare the folder's files with the manifest.

    Args:
        folder: output of `nemo-upcycle chat CONVERSATIONS DIR`.

    Raises:
        UpcycleError: the folder is unfinished, holds texts or has another format, or a file is missing or has another
            size.

    Example:
        >>> open_chat("data/answers").manifest["splits"]["train"]["packs"]  # doctest: +SKIP
        312
    """
    folder, manifest = FinishedChat.read(folder)
    for name, size_bytes in manifest["files"].items():
        require_size(folder / name, size_bytes)
    return FinishedChat(folder, manifest)


def open_data(folder: str | Path) -> FinishedBlend | FinishedChat:
    """Open a finished folder of texts or of conversations.

    Args:
        folder: output of `nemo-upcycle data` or `nemo-upcycle chat`.

    Raises:
        UpcycleError: see `open_blend` and `open_chat`.
    """
    return open_chat(folder) if is_chat(str(folder)) else open_blend(folder)
