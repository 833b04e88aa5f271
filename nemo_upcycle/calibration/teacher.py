"""What a dense parent answers: its most likely tokens at every place of the packs that the loss is on.

A folder of parts, each of whole packs, complete or absent:

00000.safetensors     keys [P, 16] and counts [P] of packs; places [N], tokens [N, K], log_probs [N, K + 1] of answers
_SUCCESS.json         what it was made from, the parts, and how much of the probability the tokens have

The last column of `log_probs` is of all other tokens together. So of both models K + 1 numbers are compared that sum
to one, and the divergence is zero, with its gradient, where the student computes what the parent does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import marker_of, read_json, require_complete


#: Of the folder; K, the tokens of a place; and of the hash by which a pack is found.
FORMAT, TOP_K, KEY_BYTES = 1, 32, 16
MADE_BY = "nemo-upcycle teach"


def pack_key(labels_S: torch.Tensor) -> bytes:
    """Return the hash of a pack's labels [S], padded as the data module pads them."""
    return hashlib.blake2b(labels_S.to("cpu", torch.int64).numpy().tobytes(), digest_size=KEY_BYTES).digest()


@dataclass(frozen=True)
class Targets:
    """The parent's answers in a pack.

    Attributes:
        places: places of the pack that are in the loss, [N].
        tokens: the likeliest tokens after each place, [N, K].
        log_probs: log-probabilities of these tokens, and of all others together, [N, K + 1].
    """

    places: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor


class Teacher:
    """A finished folder of a dense parent's answers; the packs are looked up by their labels.

    Args:
        folder: a folder that `teach` wrote.

    Raises:
        UpcycleError: the folder is not finished, or has another format.

    Example:
        >>> Teacher(Path("data/mine/teacher-1f2e3d4c")).of(labels).tokens.shape  # doctest: +SKIP
        torch.Size([412, 32])
    """

    def __init__(self, folder: Path) -> None:
        require_complete(folder, "folder of a parent's answers", f"run `{MADE_BY}` again")
        self.folder, self.manifest = folder, read_json(marker_of(folder))
        if (found := self.manifest["made_from"]["format"]) != FORMAT:
            fix = f"remove it, and run `{MADE_BY}` again"
            raise UpcycleError(str(folder), got=f"format {found}", expected=f"format {FORMAT}", fix=fix)
        self._files: dict[int, Any] = {}
        self._rows: dict[bytes, tuple[int, int, int]] = {}
        for part in range(self.manifest["parts"]):
            file = self._file(part)
            keys, counts = file.get_tensor("keys").numpy(), file.get_tensor("counts").numpy()
            ends = np.cumsum(counts)
            for key, count, end in zip(keys, counts, ends, strict=True):
                self._rows.setdefault(key.tobytes(), (part, int(end - count), int(end)))

    @property
    def made_from(self) -> dict[str, Any]:
        """What the folder follows from: parent, packs, tokens of a place."""
        made_from: dict[str, Any] = self.manifest["made_from"]
        return made_from

    def of(self, labels_S: torch.Tensor) -> Targets:
        """Look up the parent's answers in the pack with these labels; the tensors are on the CPU.

        Raises:
            UpcycleError: the parent has not seen this pack.
        """
        found = self._rows.get(pack_key(labels_S))
        if found is None:
            raise UpcycleError(
                f"packs of {self.folder}",
                got="a pack that is none of them",
                expected="those that the parent has answered",
                fix="make the folder anew from the packs that are trained on",
            )
        part, start, end = found
        file = self._file(part)
        return Targets(*(file.get_slice(name)[start:end] for name in ("places", "tokens", "log_probs")))

    def _file(self, part: int) -> Any:
        if part not in self._files:
            self._files[part] = safe_open(self.folder / part_name(part), "pt")
        return self._files[part]


@dataclass(frozen=True)
class Lesson:
    """What a training learns from its parent.

    Args:
        teacher: the parent's answers.
        weight: weight of the divergence; the cross entropy has weight 1.
        temperature: temperature at which both distributions are compared.
    """

    teacher: Teacher
    weight: float
    temperature: float = 1.0

    def describe(self) -> dict[str, Any]:
        """Describe the lesson for the receipt and `training.json`."""
        made_from, manifest = self.teacher.made_from, self.teacher.manifest
        return {
            "weight": self.weight,
            "temperature": self.temperature,
            "folder": str(self.teacher.folder),
            "parent": made_from["parent"],
            "top_k": made_from["top_k"],
            "covered": manifest["covered"],
        }


def part_name(part: int) -> str:
    """Return the name of a part's file."""
    return f"{part:05d}.safetensors"
