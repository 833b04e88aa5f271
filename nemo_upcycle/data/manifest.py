"""Join the output of the data engine's tasks, and describe the blend in its manifest.

The manifest holds weights, licences, tokens, unreadable input, the removals of every step, files and versions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend, BlendConfig
from nemo_upcycle.data.contamination import merge_contamination
from nemo_upcycle.data.finished import (
    BUILD,
    CONTAMINATION,
    FORMAT,
    HELDOUT,
    HELDOUT_OVERLAP,
    MANIFEST,
    TOKENS,
    open_blend,
)
from nemo_upcycle.data.indexed_dataset import join_datasets
from nemo_upcycle.data.losses import count_lost
from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.files import aside_of, read_json, read_json_lines, whole_file, write_json
from nemo_upcycle.utils.masking import without_secrets
from nemo_upcycle.utils.progress import ProgressLine
from nemo_upcycle.utils.schema import numbered


#: Maximum number of indexed datasets for one source and split, and bytes after which another dataset is started.
MOST_PREFIXES, PREFIX_BYTES = 16, 64 << 30
#: Share of the requested tokens below which a source is reported.
_NEAR_ENOUGH = 0.98


def _merge_tokens(work: Path, folder: Path, sources: Iterable[str], stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the tasks' indexed datasets into `folder`, and replace files of an earlier attempt.

    Return, for each source and split (`train`, `validation`), the prefixes relative to the parent of `folder`, and the
    documents, tokens and bytes of text.
    """
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    merged: dict[str, Any] = {}
    with ProgressLine("merge", total=len(stats)) as line:
        for source in sources:
            merged[source] = {}
            tasks = {number: entry["splits"] for number, entry in enumerate(stats) if entry["source"] == source}
            for split in ("train", "validation"):
                pieces = [work / "tokens" / f"{task:05d}.{split}" for task, splits in tasks.items() if split in splits]
                if pieces:
                    counts = _sum_counts(splits.get(split, {}) for splits in tasks.values())
                    prefixes = _join(pieces, aside, f"{source}_{split}")
                    merged[source][split] = {"prefixes": [f"{folder.name}/{name}" for name in prefixes], **counts}
            line.advance(len(tasks))
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return merged


def _join(pieces: list[Path], folder: Path, name: str) -> list[str]:
    """Join indexed datasets, in order, into fewer datasets, and return the names of the new datasets."""
    total_bytes = sum(Path(f"{piece}.bin").stat().st_size for piece in pieces)
    count = min(MOST_PREFIXES, len(pieces), 1 + total_bytes // PREFIX_BYTES)
    names = []
    for number in range(count):
        names.append(f"{name}_{number:02d}_text_document")
        join_datasets(pieces[number * len(pieces) // count : (number + 1) * len(pieces) // count], folder / names[-1])
    return names


def _merge_heldout(work: Path, output: Path, stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the held-out texts of all tasks into one JSON lines file, and return their counts."""
    with whole_file(output) as aside, aside.open("w", encoding="utf-8") as handle:
        for task, entry in enumerate(stats):
            if "heldout" in entry["splits"]:
                for _, line in read_json_lines(work / "tokens" / f"{task:05d}.heldout.jsonl"):
                    handle.write(json.dumps({"source": entry["source"], **line}, ensure_ascii=False) + "\n")
    return {"file": output.name, **_sum_counts(entry["splits"].get("heldout", {}) for entry in stats)}


def finish_blend(
    blend: Blend, output: Path, tasks: int, tokenizer: dict[str, Any], engine: str, items: dict[str, Any] | None
) -> dict[str, Any]:
    """Merge the engine's output, write contamination.json and manifest.json, and return the manifest.

    Args:
        blend: the blend.
        output: folder of the blend.
        tasks: number of the engine's tasks.
        tokenizer: result of `save_tokenizer`.
        engine: versions of the data engine.
        items: summary of the index of evaluation items; None if the texts were not searched.
    """
    config, work = blend.config, output / BUILD
    stats = [read_json(work / "stats" / f"{task:05d}.json") for task in range(tasks)]
    merged = _merge_tokens(work, output / TOKENS, config.sources, stats)
    heldout = _merge_heldout(work, output / HELDOUT, stats)
    if items is not None:
        removed = merge_contamination((entry["contamination"] for entry in stats), items["sets"])
        left = merge_contamination((entry["report"] for entry in stats), items["report"]["sets"])
        hits = items | {"sets": removed, "report": items["report"] | {"sets": left}}
        write_json(output / CONTAMINATION, without_secrets(hits))
    overlap = read_json(work / HELDOUT_OVERLAP) if (work / HELDOUT_OVERLAP).is_file() else None
    manifest = {
        "format": FORMAT,
        "blend": blend.name,
        "seed": config.seed,
        **_of_the_run(blend),
        "tokenizer": tokenizer,
        "sources": {
            name: {
                **_of_the_source(blend, name),
                **({"most_tokens": tokens} if (tokens := config.sources[name].tokens) else {}),
                **({"text_key": key} if (key := config.sources[name].options.get("text_key")) else {}),
                "splits": merged[name],
                "lost": count_lost([entry for entry in stats if entry["source"] == name]),
                "steps": _sum_steps(entry for entry in stats if entry["source"] == name),
                "cut": _sum_counts(entry["cut"] for entry in stats if entry["source"] == name),
                "pii": dict(sum((Counter(entry["pii"]) for entry in stats if entry["source"] == name), Counter())),
                "files": _files_of(name, stats, output),
            }
            for name in config.sources
        },
        "splits": {
            "train": _sum_counts(entry["splits"].get("train", {}) for entry in stats),
            "validation": _sum_counts(entry["splits"].get("validation", {}) for entry in stats),
            "heldout": heldout,
        },
        "heldout_overlap": overlap and {"most": config.heldout_overlap, **overlap},
        "decontaminated_against": list(config.decontaminate) if items else None,
        "decontaminated_without": list(config.decontaminate_without),
        "tasks": len(stats),
        "made_by": {"nemo_upcycle": __version__, "engine": engine},
    }
    write_json(output / MANIFEST, manifest := without_secrets(numbered(manifest)))
    return manifest


def texts_of(config: BlendConfig) -> dict[str, Any]:
    """Return the settings that affect the tokens; weights and settings of a run are omitted and may change later."""
    values = dataclasses.asdict(config)
    for key in ("seq_length", "max_epochs"):
        del values[key]
    for source in values["sources"].values():
        for key in ("weight", "license", "trains", "max_lost"):
            del source[key]
    return values


def describe_anew(blend: Blend, output: Path) -> dict[str, Any]:
    """Return the manifest of a finished folder with the blend's present weights; write the manifest if it changed."""
    manifest = open_blend(output).manifest
    now = manifest | _of_the_run(blend)
    now["sources"] = {name: entry | _of_the_source(blend, name) for name, entry in manifest["sources"].items()}
    if now != manifest:
        write_json(output / MANIFEST, now)
    return now


def _of_the_run(blend: Blend) -> dict[str, Any]:
    return {key: getattr(blend.config, key) for key in ("seq_length", "max_epochs")}


def _of_the_source(blend: Blend, name: str) -> dict[str, Any]:
    source = blend.config.sources[name]
    return {"weight": blend.share(name), "license": source.license, "trains": source.trains}


def shortfalls(manifest: Mapping[str, Any]) -> list[str]:
    """Describe the sources that give over 2 % fewer tokens than their `tokens` setting asks for."""
    lines = []
    for name, source in manifest["sources"].items():
        asked, got = source.get("most_tokens", 0), source["splits"]["train"]["tokens"]
        if got < _NEAR_ENOUGH * asked:
            is_left = source["steps"]["tokenise"]["removed"]
            why = "the remaining documents are too long" if is_left else "no more documents remain after the removals"
            lines.append(f"source {name} gives only {got:,} of the {asked:,.0f} requested tokens, because {why}")
    return lines


def _files_of(source: str, stats: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Return the files that a source was read from; paths of rendered files are relative to the blend's folder."""
    within = f"{output.absolute()}{os.sep}"
    files: dict[str, Any] = {}
    for entry in stats:
        for path, file in entry["files"].items() if entry["source"] == source else ():
            name = without_secrets(path.removeprefix(within))
            if path.startswith(within):  # each build renders this file again
                file = {key: value for key, value in file.items() if key != "modified_ns"}
            if name in files:  # the file was read in parts
                digests = f"{files[name]['texts_xxh3_128']}-{file['texts_xxh3_128']}"
                file = file | {"whole": files[name]["whole"] and file["whole"], "texts_xxh3_128": digests}
            files[name] = file
    return files


def _sum_counts(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the sums of counts by name; documents, tokens and bytes of text are always included."""
    total: Counter[str] = Counter(documents=0, tokens=0, bytes=0)
    for one in counts:
        total.update(one)
    return dict(total)


def _sum_steps(stats: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return, for each step, how many documents came in, were kept, and were removed for each reason."""
    steps: dict[str, dict[str, Any]] = {}
    for entry in stats:
        for name, step in entry["steps"].items():
            into = steps.setdefault(name, {"in": 0, "kept": 0, "removed": Counter()})
            into["in"] += step["in"]
            into["kept"] += step["kept"]
            into["removed"].update(step["removed"])
    return {name: step | {"removed": dict(sorted(step["removed"].items()))} for name, step in steps.items()}
