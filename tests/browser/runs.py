"""A run whose report has everything that could be cut: long names, wide tables, unbroken words, all figures."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.reporting.conftest import EVALUATIONS, write_run


UNBROKEN = "unbroken" * 30
LAYERS = {"load_cv": [0.1, 0.3], "load_entropy": [0.9, 0.95], "dropped": [0.0, 0.1], "dead_experts": [1, 0]}


def write_wide_run(folder: Path) -> Path:
    """Write what the stages of such a run leave, and return its folder."""
    write_run(folder)
    (folder / "command.txt").write_text(f"nemo upcycle pipeline --factory {UNBROKEN} dir={folder} --yes\n")
    for name, value in EVALUATIONS.items():
        texts = dict.fromkeys(("document", "prompt", "goes_on", "continuation"), UNBROKEN)
        (folder / f"evaluation/{name}.json").write_text(json.dumps(value | {"samples": [texts]}))
    for stage in ("pretrain", "dense_ct"):
        path = folder / stage / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        many = [{"step": 0, "validation_loss": 4.0}]
        for step in range(1, 401):
            line = dict(lines[2 * ((step - 1) % 3)]) | {"step": step, "tokens": 1000 * step, "loss": 3 + 1 / step}
            many.append(line | ({"router": LAYERS} if "expert_load" in line else {}))
        score = {"heldout_perplexity/bits_per_byte": {"value": 1.5, "stderr": 0.01}}
        many += [{"step": 400, "validation_loss": 3.1}, {"step": 400, "evaluation": score}]
        path.write_text("".join(json.dumps(line) + "\n" for line in many))
    return folder
