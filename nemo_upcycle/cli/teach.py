"""`nemo-upcycle teach`: let the dense parent answer packed conversations, for a tuning that stays near it."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from nemo_upcycle.cli.common import show
from nemo_upcycle.utils.files import size_text


EPILOG = """examples:
  nemo-upcycle teach /models/Llama-3-8B-Instruct data/mine
  nemo-upcycle teach asset://smollm2-135m runs/answers

Then tune with data.teacher_weight=1.0. A tuning without these answers makes them as it starts, on one process.
Run it again to continue where it was stopped.
exit status: 0 done; 2 a value or a file is wrong."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    text = "dense Hugging Face folder, hf://ORG/NAME on the hub (downloaded), or asset://smollm2-135m"
    parser.add_argument("source", metavar="SRC", help=text)
    parser.add_argument("data", metavar="DIR", type=Path, help="finished folder of nemo-upcycle chat")


def run(args: argparse.Namespace) -> int:
    """Let the model answer, show the result, and return the exit status.

    Raises:
        UpcycleError: a value or a file is wrong.
    """
    from nemo_upcycle.data.chat.finished import open_chat
    from nemo_upcycle.data.chat.taught import teach_chat
    from nemo_upcycle.data.dense import ensure_dense

    done = teach_chat(open_chat(args.data), ensure_dense(args.source))
    how = f"made in {done.seconds:.3g} s" if done.made else "made before, from the same inputs"
    text = (
        f"{done.path}: {done.answer_tokens:,} answer tokens of {done.packs:,} packs, the {done.top_k} likeliest"
        f" of each ({100 * done.covered:.3g} % of the probability), {size_text(done.size_bytes)}, {how}"
    )
    show(args, asdict(done), text)
    return 0
