"""Writes small inputs for the engine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from nemo_upcycle.data.ngrams import NgramIndex
from nemo_upcycle.data.suites.items import Item


END = "<|endoftext|>"
#: The evaluation item in the index that `write_index` writes.
QUESTION = "Which of these seven rivers carries more water to the sea than all of the others taken together?"
#: Settings for finding near duplicates.
MINHASH = {"bands": 14, "hashes_per_band": 8, "n_grams": 5}
_TEXT = "the quick brown fox jumps over a lazy dog while Ünïcødé naïve café 123 4567 def f(x): return x"
_WORDS = _TEXT.split()


def sentence(number: int, words: int = 12) -> str:
    """Return a text that is unique to a number."""
    picked = [_WORDS[(number * 7 + n * n + n // 3) % len(_WORDS)] for n in range(words)]
    return f"{number}: {' '.join(picked)}."


@lru_cache
def tokenizer_json() -> str:
    """Return a byte-level BPE with 400 tokens; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END, "<pad>"], initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator([sentence(n) for n in range(50)], trainer)
    tokenizer.add_tokens([AddedToken("    ", special=False, normalized=False)])  # as in GPT-NeoX's tokenizer
    return tokenizer.to_str()


def write_plan(folder: Path, tasks: Iterable[dict[str, Any]], **more: Any) -> Path:
    """Write a plan and its tokenizer, and return the plan's path."""
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        tokenizer.write_text(tokenizer_json(), encoding="utf-8")
    plain = {"split": "train", "options": {}, "max_tokens": None, "on_hit": "drop"}
    plan = {
        **{"tokenizer": str(tokenizer), "eos_id": 0, "vocab_size": 401},
        **{"seed": 1234, "finders": 1, "strict": False, "hold_out": {}},
        **{"deduplicate": True, "min_characters": 1, "ngram_index": None},
        "tasks": [{**plain, "source": "source", "reader": "jsonl", **task} for task in tasks],
        **more,
    }
    (work / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    return work / "plan.json"


def jsonl(*many: object) -> bytes:
    """Return JSON lines, each with a text."""
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in many)


def write_jsonl(path: Path, *many: str) -> str:
    """Write texts as JSON lines, and return the file's path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jsonl(*many))
    return str(path)


def blend(folder: Path, documents: int = 60, words: int = 12, **more: object) -> Path:
    """Write a plan of six tasks with overlapping inputs and bad lines."""
    tasks = []
    for task in range(6):
        numbers = range(task * documents // 2, task * documents // 2 + documents)
        file = folder / "input" / f"{task}.jsonl"
        write_jsonl(file, "", *(sentence(n, words) for n in numbers))
        with file.open("a", encoding="utf-8") as handle:
            handle.write("{broken\n")
        tasks.append({"files": [str(file)], "split": None})
    return write_plan(folder, tasks, hold_out={"validation": 0.1, "heldout": 0.05}, **more)


def write_index(folder: Path, short_words: int = 0) -> str:
    """Write an index of one evaluation item, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    NgramIndex.build([Item("rivers", "17", (QUESTION,))], short_words=short_words).save(folder / "ngrams.npz")
    return str(folder / "ngrams.npz")
