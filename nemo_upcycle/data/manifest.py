"""What a finished blend says of itself: weights, licences, tokens, what every step removed, files, versions."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend, BlendConfig
from nemo_upcycle.data.finished import FORMAT, MANIFEST, open_blend
from nemo_upcycle.data.merge import sum_counts, sum_steps
from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.files import write_json


def make_manifest(
    blend: Blend,
    output: Path,
    stats: list[dict[str, Any]],
    merged: dict[str, Any],
    heldout: dict[str, Any],
    tokenizer: dict[str, Any],
    engine: str,
    decontaminated: bool,
) -> dict[str, Any]:
    """Return the manifest of a blend.

    Args:
        blend: the blend.
        output: its folder.
        stats: what every task of the engine counted.
        merged: what `merge_tokens` returned.
        heldout: what `merge_heldout` returned.
        tokenizer: what `save_tokenizer` returned.
        engine: versions of the data engine.
        decontaminated: whether evaluation items were looked for.
    """
    config = blend.config
    return {
        "format": FORMAT,
        "blend": blend.name,
        "seed": config.seed,
        **_of_the_run(blend),
        "tokenizer": tokenizer,
        "sources": {
            name: {
                **_of_the_source(blend, name),
                "splits": merged[name],
                "steps": sum_steps(entry for entry in stats if entry["source"] == name),
                "cut": sum_counts(entry["cut"] for entry in stats if entry["source"] == name),
                "files": _files_of(name, stats, output),
            }
            for name in config.sources
        },
        "splits": {
            "train": sum_counts(entry["splits"].get("train", {}) for entry in stats),
            "validation": sum_counts(entry["splits"].get("validation", {}) for entry in stats),
            "heldout": heldout,
        },
        "decontaminated_against": list(config.decontaminate) if decontaminated else None,
        "tasks": len(stats),
        "made_by": {"nemo_upcycle": __version__, "engine": engine},
    }


def texts_of(config: BlendConfig) -> dict[str, Any]:
    """Return what decides the tokens; weights and what a run makes of them may change afterwards."""
    values = dataclasses.asdict(config)
    for key in ("seq_length", "run_tokens", "max_epochs"):
        del values[key]
    for source in values["sources"].values():
        for key in ("weight", "license", "trains"):
            del source[key]
    return values


def describe_anew(blend: Blend, output: Path) -> dict[str, Any]:
    """Return the manifest of a finished folder, with the blend's present weights, and write it if they are new."""
    manifest = open_blend(output).manifest
    now = manifest | _of_the_run(blend)
    now["sources"] = {name: entry | _of_the_source(blend, name) for name, entry in manifest["sources"].items()}
    if now != manifest:
        write_json(output / MANIFEST, now)
    return now


def _of_the_run(blend: Blend) -> dict[str, Any]:
    return {key: getattr(blend.config, key) for key in ("seq_length", "run_tokens", "max_epochs")}


def _of_the_source(blend: Blend, name: str) -> dict[str, Any]:
    source = blend.config.sources[name]
    return {"weight": blend.share(name), "license": source.license, "trains": source.trains}


def _files_of(source: str, stats: list[dict[str, Any]], output: Path) -> dict[str, Any]:
    """Return the files that a source was read from; those rendered for this blend relative to its folder."""
    within = f"{output.absolute()}{os.sep}"
    mine = [entry["files"] for entry in stats if entry["source"] == source]
    return {path.removeprefix(within): file for files in mine for path, file in files.items()}
