"""The answers of a dense parent to the packs of a finished folder: made once, beside the packs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from filelock import FileLock

from nemo_upcycle.calibration.teacher import Teacher
from nemo_upcycle.data.chat.finished import PACKS, FinishedChat
from nemo_upcycle.data.finished import MANIFEST, TOKENIZER
from nemo_upcycle.sources import open_dense
from nemo_upcycle.sources.calibrated import parent_digest
from nemo_upcycle.utils.files import is_complete, sha256_file


if TYPE_CHECKING:
    from nemo_upcycle.calibration.teach import Pack, TeacherReport


def teach_chat(finished: FinishedChat, dense: str | Path) -> TeacherReport:
    """Let a dense model answer the training packs of a finished folder; finished answers are kept.

    Args:
        finished: the folder; the answers become a folder inside it.
        dense: the dense model: a Hugging Face folder on this machine.

    Raises:
        UpcycleError: see `calibration.teach.teach`.
    """
    from nemo_upcycle.calibration.teach import teach

    finished.require_tokenizer_of(str(dense))
    about = {"chat": finished.name, "manifest_sha256": sha256_file(finished.folder / MANIFEST)}
    with open_dense(dense) as source:
        return teach(source, _folder(finished, parent_digest(source)), packs_of(finished), about)


def teacher_of(finished: FinishedChat, dense: str | Path) -> Teacher:
    """Return a dense model's answers to the packs of a finished folder, made first if they are missing.

    Several ranks may call it at the same time: one makes them, the others wait.

    Args:
        finished: the folder.
        dense: the dense model, see `teach_chat`.
    """
    with open_dense(dense) as source:
        folder = _folder(finished, parent_digest(source))
    if not is_complete(folder):
        with FileLock(f"{folder}.lock"):
            teach_chat(finished, dense)
    return Teacher(folder)


def packs_of(finished: FinishedChat) -> list[Pack]:
    """Return the packs of a finished folder that are trained on, labelled as NeMo's data module labels them."""
    from nemo_upcycle.calibration.teach import Pack
    from nemo_upcycle.data.tokenizers import open_tokenizer

    size, padding = finished.manifest["seq_length"], open_tokenizer(finished.folder / TOKENIZER).eos_token_id
    packs = []
    for row in np.load(finished.folder / PACKS["train"], allow_pickle=True):
        ids, is_scored = (torch.from_numpy(np.asarray(row[name])) for name in ("input_ids", "loss_mask"))
        borders = list(itertools.pairwise([*row["seq_start_id"], len(ids)]))
        labels = torch.full((size,), padding)
        ahead = torch.cat([ids[begin + 1 : end] for begin, end in borders])
        labels[: len(ahead)] = ahead
        sequences = tuple((ids[begin : end - 1].long(), is_scored[begin : end - 1].bool()) for begin, end in borders)
        packs.append(Pack(labels, sequences))
    return packs


def _folder(finished: FinishedChat, digest: str) -> Path:
    return finished.folder / f"teacher-{digest[:12]}"
