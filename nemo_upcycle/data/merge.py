"""Join what the tasks of the data engine wrote: indexed datasets by source and split, held-out texts, counts."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.data.indexed_dataset import join_datasets
from nemo_upcycle.utils.files import read_json, read_json_lines, whole_file
from nemo_upcycle.utils.progress import ProgressLine


#: Indexed datasets of one source and split; a sample never crosses from one into the next.
MOST_PREFIXES, PREFIX_BYTES = 16, 64 << 30


def read_stats(work: Path, tasks: int) -> list[dict[str, Any]]:
    """Return what every task counted, in their order."""
    return [read_json(work / "stats" / f"{task:05d}.json") for task in range(tasks)]


def merge_tokens(work: Path, folder: Path, sources: Iterable[str], stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the tasks' indexed datasets.

    Args:
        work: the engine's folder.
        folder: where `SOURCE_SPLIT_NN_text_document.{bin,idx}` go; an earlier try's files are replaced.
        sources: their names.
        stats: of every task.

    Returns:
        For each source and split (`train`, `validation`) the prefixes, relative to the parent of `folder`, and the
        documents, tokens and bytes of text.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    merged: dict[str, Any] = {}
    with ProgressLine("merge", total=len(stats)) as line:
        for source in sources:
            merged[source] = {}
            mine = [(task, entry) for task, entry in enumerate(stats) if entry["source"] == source]
            for split in ("train", "validation"):
                pieces = [work / "tokens" / f"{task:05d}.{split}" for task, entry in mine if split in entry["splits"]]
                if pieces:
                    counts = sum_counts(entry["splits"].get(split, {}) for _, entry in mine)
                    prefixes = _join(pieces, aside, f"{source}_{split}")
                    merged[source][split] = {"prefixes": [f"{folder.name}/{name}" for name in prefixes], **counts}
            line.advance(len(mine))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return merged


def _join(pieces: list[Path], folder: Path, name: str) -> list[str]:
    """Join indexed datasets into a few, in their order; return the names."""
    total_bytes = sum(Path(f"{piece}.bin").stat().st_size for piece in pieces)
    count = min(MOST_PREFIXES, len(pieces), 1 + total_bytes // PREFIX_BYTES)
    names = []
    for number in range(count):
        names.append(f"{name}_{number:02d}_text_document")
        join_datasets(pieces[number * len(pieces) // count : (number + 1) * len(pieces) // count], folder / names[-1])
    return names


def merge_heldout(work: Path, output: Path, stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the held-out texts of all tasks into one JSON lines file; return their counts."""
    with whole_file(output) as aside, aside.open("w", encoding="utf-8") as handle:
        for task, entry in enumerate(stats):
            if "heldout" in entry["splits"]:
                for _, line in read_json_lines(work / "tokens" / f"{task:05d}.heldout.jsonl"):
                    handle.write(json.dumps({"source": entry["source"], **line}, ensure_ascii=False) + "\n")
    return {"file": output.name, **sum_counts(entry["splits"].get("heldout", {}) for entry in stats)}


def sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return counts by name, summed; documents, tokens and bytes of text are always among them."""
    total: Counter[str] = Counter(documents=0, tokens=0, bytes=0)
    for one in counts:
        total.update(one)
    return dict(total)


def sum_steps(stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return, for each step, how many documents came in, were kept, and were removed for what reason."""
    steps: dict[str, dict[str, Any]] = {}
    for entry in stats:
        for name, step in entry["steps"].items():
            into = steps.setdefault(name, {"in": 0, "kept": 0, "removed": Counter()})
            into["in"] += step["in"]
            into["kept"] += step["kept"]
            into["removed"].update(step["removed"])
    return {name: step | {"removed": dict(sorted(step["removed"].items()))} for name, step in steps.items()}
