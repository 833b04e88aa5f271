"""Read a finished folder of conversations, or a finished folder of either kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.chat.config import KIND, is_chat
from nemo_upcycle.data.finished import HELDOUT, Finished, open_blend
from nemo_upcycle.data.indexed_dataset import require_size
from nemo_upcycle.errors import UpcycleError


#: Of the manifest; and what the folder holds.
FORMAT = 1
PACKS = {"train": "training.npy", "validation": "validation.npy"}
PACKING, REMOVED = "packing.json", "removed.jsonl"


@dataclass(frozen=True)
class FinishedChat(Finished):
    """A finished folder of conversations."""

    kind, format, key, command = KIND, FORMAT, "chat", "nemo-upcycle chat"

    @property
    def packs(self) -> int:
        """Return the packs to train on."""
        return int(self.manifest["splits"]["train"]["packs"])

    @property
    def card(self) -> str:
        """See `Finished.card`."""
        train = self.manifest["splits"]["train"]
        return (
            f"conversations {self.name}, {train['conversations']:,} with {train['answers']:,} answers of"
            f" {train['answer_tokens']:,} tokens to train on ({self.manifest['license']})"
        )

    @property
    def files(self) -> list[str]:
        """See `Finished.files`."""
        return [*PACKS.values(), HELDOUT]

    @property
    def held_out(self) -> dict[str, Any]:
        """See `Finished.held_out`: `document`, `turn`, `prompt` and `answer` of each answer."""
        return {"heldout_documents": [], "answers": self.lines()}

    def validation_tokens(self) -> Iterator[Any]:
        """See `Finished.validation_tokens`: of all packs, since few are validated on."""
        import numpy as np

        for split in ("validation", "train"):
            yield from (row["input_ids"] for row in np.load(self.folder / PACKS[split], allow_pickle=True))

    def require_length(self, seq_length: int) -> None:
        """See `Finished.require_length`: the packs have it."""
        if seq_length != (made := self.manifest["seq_length"]):
            raise UpcycleError(
                "data.seq_length",
                got=seq_length,
                expected=f"{made}, which the packs of {self.folder} have",
                fix="set it so, or make a folder with seq_length of the training",
            )

    def describe(self, steps: int, step_packs: int) -> str:
        """Say what a run reads of the folder.

        Args:
            steps: steps of the run.
            step_packs: packs of a step, over all ranks.
        """
        epochs = steps * step_packs / self.packs
        return f"data: {self.card}, in {self.packs:,} packs; {steps} steps read {epochs:.2f} epochs"


def open_chat(folder: str | Path) -> FinishedChat:
    """Read the manifest of a finished folder of conversations, and check its files against it.

    Args:
        folder: the output of `nemo-upcycle chat CONVERSATIONS DIR`.

    Raises:
        UpcycleError: the folder is not finished, holds texts, is of another format, or a file is missing or of another
            size.

    Example:
        >>> open_chat("data/answers").packs  # doctest: +SKIP
        312
    """
    folder, manifest = FinishedChat.read(folder)
    for name, size_bytes in manifest["files"].items():
        require_size(folder / name, size_bytes)
    return FinishedChat(folder, manifest)


def open_data(folder: str | Path) -> Finished:
    """Open a finished folder of texts or of conversations.

    Args:
        folder: the output of `nemo-upcycle data` or `nemo-upcycle chat`.

    Raises:
        UpcycleError: see `open_blend` and `open_chat`.
    """
    return open_chat(folder) if is_chat(str(folder)) else open_blend(folder)
