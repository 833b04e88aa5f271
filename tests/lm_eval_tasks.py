"""Writes lm-eval tasks, and the files from which the tasks read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml


def write_task(folder: Path, name: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], **definition: Any) -> None:
    """Write a task's definition, and a file with the rows of each split; a split without rows gets no file."""
    files = {split: folder / f"{name}.{split}.jsonl" for split in rows}
    for split, values in rows.items():
        if values:
            files[split].write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
        **{f"{kind}_split": split for kind, split in (("training", "train"), ("test", "test")) if split in rows},
        **definition,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
