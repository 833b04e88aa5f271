"""Packs of conversations for a tiny parent, and the parent's loss on them in transformers."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch

from nemo_upcycle.data.chat.build_chat import build_chat
from nemo_upcycle.data.chat.config import read_chat
from nemo_upcycle.models.hf_model import load_model
from tests.chats import sums, write_chat_tokenizer, write_lines
from tests.functional.tiny import SEQUENCE
from tests.models import write_llama


def write_packs(folder: Path) -> tuple[Path, Path]:
    """Write a parent (two ranks can share its vocabulary), `sums.jsonl` and its packs; return parent and packs."""
    parent = write_chat_tokenizer(write_llama(folder / "parent", tied=True, vocab_size=260))
    lines = write_lines(folder / "sums.jsonl", sums(60))
    values = [f"tokenizer={parent}", f"seq_length={SEQUENCE}", "validation=0.1", "heldout=0.1"]
    build_chat(read_chat(lines, values), folder / "chat")
    return parent, folder / "chat"


@torch.no_grad()
def answer_loss(parent: Path, packs: Path) -> float:
    """Return the mean loss over the scored tokens of a transformers model that reads one conversation at a time.

    Args:
        parent: folder of the model.
        packs: file of packed conversations.
    """
    model, total, count = load_model(parent, dtype=torch.float32).eval(), 0.0, 0
    for row in np.load(packs, allow_pickle=True):
        borders = [*row["seq_start_id"], len(row["input_ids"])]
        for begin, end in itertools.pairwise(borders):
            ids = torch.from_numpy(row["input_ids"][begin:end].astype(np.int64))
            scored = torch.from_numpy(row["loss_mask"][begin : end - 1].astype(bool))
            values = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total, count = total + float(values[scored].sum()), count + int(scored.sum())
    return total / count
