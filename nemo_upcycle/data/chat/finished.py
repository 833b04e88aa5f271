"""Read a finished folder of conversations: its packs for training, and its held-out answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.chat.config import KIND
from nemo_upcycle.data.finished import Finished
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
        """Describe the data for a model card."""
        train = self.manifest["splits"]["train"]
        return (
            f"conversations {self.name}, {train['conversations']:,} with {train['answers']:,} answers of"
            f" {train['answer_tokens']:,} tokens to train on ({self.manifest['license']})"
        )

    def answers(self) -> list[dict[str, Any]]:
        """Return the answers that were held back: `document`, its `turn`, the `prompt` before it, and the `answer`."""
        return self.lines()

    def require_length(self, seq_length: int) -> None:
        """Check that a training takes packs of the length that these have.

        Raises:
            UpcycleError: it does not.
        """
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
