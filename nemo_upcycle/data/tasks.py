"""The plan that the data engine is given: which files are read together, and what happens to their documents."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import SPLITS, Blend
from nemo_upcycle.data.finished import BUILD, TOKENIZER
from nemo_upcycle.data.inputs import InputFile


#: The n-grams of evaluation items in the folder of what a blend is built from.
NGRAMS, REPORT_NGRAMS = "ngrams.npz", "report_ngrams.npz"
#: Files are put together into tasks of this size; what a killed run loses is the tasks that were running.
TASK_BYTES = 256 << 20
#: Tasks of the engine for each of the steps that find equal texts.
TASKS_A_FINDER = 64


def make_plan(
    blend: Blend, inputs: dict[str, dict[str, list[InputFile]]], output: Path, tokenizer: dict[str, Any]
) -> dict[str, Any]:
    """Return the engine's plan. Held-out files come first: of equal texts, the one that is not trained on stays.

    Args:
        blend: the blend.
        inputs: the files of every source and split.
        output: the folder of the blend.
        tokenizer: what `save_tokenizer` said of the one in it.
    """
    config, tasks = blend.config, []
    for split in reversed(SPLITS):
        for name, source in config.sources.items():
            splits = inputs[name]
            has_own = bool(splits["validation"] or splits["heldout"])
            groups, trained = _groups(splits[split]), split == "train"
            sizes = [
                sum(TASK_BYTES if file.size_bytes is None else file.size_bytes for file in group) for group in groups
            ]
            for group, size_bytes in zip(groups, sizes, strict=True):
                share = size_bytes / max(1, sum(sizes))
                tasks.append(
                    {
                        "source": name,
                        "reader": group[0].reader,
                        "split": split if has_own or not trained else None,
                        "files": [file.path for file in group],
                        "options": _joined_options(group),
                        "max_tokens": math.ceil(source.tokens * share) if trained and source.tokens else None,
                        "on_hit": source.on_hit,
                    }
                )
    return {
        "tokenizer": str((output / TOKENIZER / "tokenizer.json").absolute()),
        "eos_id": tokenizer["eos_id"],
        "vocab_size": tokenizer["vocab_size"],
        "ngram_index": str((output / BUILD / NGRAMS).absolute()) if config.decontaminate else None,
        "report_index": str((output / BUILD / REPORT_NGRAMS).absolute()) if config.decontaminate else None,
        "seed": config.seed,
        "deduplicate": config.deduplicate,
        "finders": 1 + len(tasks) // TASKS_A_FINDER,
        "min_characters": config.min_characters,
        "hold_out": dataclasses.asdict(config.hold_out),
        "tasks": tasks,
    }


def _groups(files: list[InputFile]) -> list[list[InputFile]]:
    """Put neighbouring files of one kind together until they reach the size of a task."""
    groups: list[list[InputFile]] = []
    room = 0
    for file in files:
        size_bytes = TASK_BYTES if file.size_bytes is None else file.size_bytes
        if not groups or size_bytes > room or groups[-1][0].reader != file.reader:
            groups.append([])
            room = TASK_BYTES
        groups[-1].append(file)
        room -= size_bytes
    return groups


def _joined_options(group: list[InputFile]) -> dict[str, Any]:
    """Return the options of a group's files; the lists of duplicates, which differ, by file."""
    options = {name: value for name, value in group[0].options.items() if name != "duplicates"}
    lists = {file.path: file.options["duplicates"] for file in group if "duplicates" in file.options}
    return options | ({"duplicates": lists} if lists else {})
