"""The evidence of a grid: all measurements of its trainings in one file, from which all tables are computed.

Numbers are never used as keys, because JSON would turn them into text.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.heldout import document_sums
from nemo_upcycle.reporting.results import summarise_router
from nemo_upcycle.reporting.router_metrics import ROUTER_METRICS
from nemo_upcycle.reporting.run_folder import read_curve, read_manifest
from nemo_upcycle.utils.files import read_json, whole_file


#: PLAN is a file in the folder of a grid; EVIDENCE is a file in the folder of its table.
PLAN, EVIDENCE = "grid.json", "evidence.json.gz"


def collect_evidence(run_dir: Path, name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """Collect the measurements of a grid's trainings, as plain values.

    Args:
        run_dir: folder of the grid, whose trainings are finished.
        name: name of the grid.
        described: entry `described` of the grid's plan.

    Returns:
        A dict with `grid`, `described`, `documents` (`names` and `bytes` of the held-out texts), `cells`,
        `heldout_overlap`, and `heldout` (`tokens` and `bytes` of the held-out texts); the last two come from the
        data's manifest and may be None. Each cell is a training with `flops_per_token`, `ranks`, `scores` (`step` of
        each evaluation, and the exact log-likelihood of every document in `nats`), and for all steps `tokens`,
        `seconds` and `routers` (means over the layers, six digits).

    Raises:
        UpcycleError: a file is missing or damaged, or two evaluations used different documents.
    """
    cells: dict[str, Any] = {}
    documents: dict[str, Any] = {}
    for cell in described["cells"]:
        settings = read_json(run_dir / cell / "training.json")
        steps = read_curve(run_dir / cell / "metrics.jsonl").steps
        scores = []
        for path in sorted((run_dir / cell / "evaluation").glob("step=*.json"), key=_step_of):
            sums = document_sums(read_json(path))
            scored: dict[str, Any] = {"names": list(sums), "bytes": [size_bytes for _, size_bytes in sums.values()]}
            documents = documents or scored
            if scored != documents:
                raise UpcycleError(
                    str(path),
                    kind="state",
                    got=(
                        f"does not score the same documents as the other trainings of the grid "
                        f"(number of documents: {len(scored['names'])} and {len(documents['names'])})"
                    ),
                    fix="score all trainings of the grid with the same suite",
                )
            scores.append({"step": _step_of(path), "nats": [nats for nats, _ in sums.values()]})
        routers = [summarise_router(line.get("router") or {}) for line in steps]
        cells[cell] = {
            "flops_per_token": settings["flops_per_token"]["full"],
            "ranks": settings["ranks"],
            "scores": scores,
            "tokens": [line["tokens"] for line in steps],
            "seconds": [line["seconds"] for line in steps],
            "routers": {
                key: [float(f"{one[key]:.6g}") if key in one else None for one in routers]
                for key in ROUTER_METRICS
                if any(key in one for one in routers)
            },
        }
    manifest = read_manifest(run_dir)
    counts = manifest.get("splits", {}).get("heldout")
    return {
        "grid": name,
        "described": described,
        "documents": documents,
        "cells": cells,
        "heldout_overlap": manifest.get("heldout_overlap"),
        "heldout": counts and {key: counts[key] for key in ("tokens", "bytes")},
    }


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def write_evidence(path: Path, evidence: Mapping[str, Any]) -> None:
    """Write evidence as compressed JSON; the same values give the same bytes."""
    content = json.dumps(evidence, separators=(",", ":")).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as aside:
        aside.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))


def read_evidence(path: Path) -> dict[str, Any]:
    """Read a file that `write_evidence` wrote.

    Raises:
        UpcycleError: the file is missing or damaged.
    """
    try:
        evidence: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise UpcycleError(
            str(path),
            kind="state",
            got=f"is not the evidence of a grid ({error})",
            fix=f"copy table/{EVIDENCE} of its run again",
        ) from None
    return evidence
