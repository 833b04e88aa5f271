"""Read a finished folder of conversations: what can be trained on, and what was held back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.chat.config import KIND
from nemo_upcycle.data.finished import HELDOUT, MANIFEST, require_same_tokenizer
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, read_json_lines, require_complete, resolved
from nemo_upcycle.utils.schema import require_known


#: Of the manifest; and what the folder holds.
FORMAT = 1
PACKS = {"train": "training.npy", "validation": "validation.npy"}
PACKING, REMOVED = "packing.json", "removed.jsonl"


@dataclass(frozen=True)
class FinishedChat:
    """A finished folder and its manifest.

    Attributes:
        folder: absolute, without links.
        manifest: as `nemo-upcycle chat` writes it.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the set."""
        return str(self.manifest["chat"])

    @property
    def packs(self) -> int:
        """Return the packs to train on."""
        return int(self.manifest["splits"]["train"]["packs"])

    @property
    def card(self) -> str:
        """Return what a model card says of the data."""
        train = self.manifest["splits"]["train"]
        return (
            f"conversations {self.name}, {train['conversations']:,} with {train['answers']:,} answers of"
            f" {train['answer_tokens']:,} tokens to train on ({self.manifest['license']})"
        )

    def answers(self) -> list[dict[str, Any]]:
        """Return the answers that were held back: `document`, its `turn`, the `prompt` before it, and the `answer`."""
        return [line for _, line in read_json_lines(self.folder / HELDOUT)]

    def require_tokenizer_of(self, dense: str) -> None:
        """Check that the packs were made with the tokenizer of a dense model, as those of a blend are.

        Raises:
            UpcycleError: they were not, or the dense model cannot be read.
        """
        require_same_tokenizer(self.folder, self.manifest["tokenizer"]["sha256"], dense, "nemo-upcycle chat")

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
        """Return what a run reads of the folder, a line for people.

        Args:
            steps: of the run.
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
    folder = resolved(Path(folder).expanduser())
    again = "run `nemo-upcycle chat CONVERSATIONS DIR` with it as DIR"
    require_complete(folder, "folder of conversations", again)
    manifest = read_json(folder / MANIFEST)
    require_known(manifest, folder / MANIFEST)
    kind = manifest.get("kind", "texts") if isinstance(manifest, dict) else "no JSON object"
    if kind != KIND or manifest["format"] != FORMAT:
        got = kind if kind != KIND else f"format {manifest['format']}"
        raise UpcycleError(
            str(folder / MANIFEST), got=got, expected=f"{KIND}, format {FORMAT}", fix=f"choose another folder: {again}"
        )
    for name, size_bytes in manifest["files"].items():
        path = folder / name
        actual = path.stat().st_size if path.is_file() else None
        if actual != size_bytes:
            got = "no such file" if actual is None else f"{actual} bytes"
            fix = "copy the folder again, or remove it and make it again"
            raise UpcycleError(str(path), got=got, expected=f"{size_bytes} bytes", fix=fix)
    return FinishedChat(folder, manifest)
