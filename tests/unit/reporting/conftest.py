"""A small run folder with numbers that are easy to find in the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from nemo_upcycle.reporting.report import write_report
from tests.unit.evaluation.test_compare import evaluation as items_of


RECEIPT = {
    "spec": {"num_experts": 4, "top_k": 2, "seed": 4321},
    **{"source": "models/dense", "exact": True},
    "layout": {"tensor": 1, "expert": 1},
    "parameters": [
        {"name": "embedding", "made_by": "copied", "dtype": "float32"},
        {"name": "experts", "made_by": "copied into 4 experts", "dtype": "float32"},
    ],
    **{"max_abs_logit_diff": 6.25e-5, "tolerance": 2e-4, "within_tolerance": True},
    **{"max_abs_logit_diff_same_stack": 7.5e-6, "tolerance_same_stack": 2e-5},
    **{"max_abs_logit": 31.5, "tokens_compared": 512, "same_argmax": 1.0},
    **{"dense_params": 100_000_000, "total_params": 300_000_000, "active_params": 150_000_000},
    **{"bytes_read": 2**28, "bytes_needed": 2**28, "bytes_written": 3 * 2**29, "seconds": 1.25, "ranks": 1},
}


PLAN = {"recipe": "smollm2_135m_e8t2", "dense": "hf:///models/Tiny-100M", "trainer": "bridge"}
SETTINGS = {
    "data": "NeMo's mock data (random tokens)",
    **{"max_steps": 3, "ranks": 2, "micro_batch_size": 1, "global_batch_size": 4, "seq_length": 250},
    **{"precision": "bf16-mixed", "optimizer": "adam", "weight_decay": 0.1, "max_lr": 3e-5},
    "schedule": {"name": "CosineAnnealing", "warmup_steps": 1, "constant_steps": 0, "min_lr": 3e-7},
    "flops_per_token": {"full": 3e9, "causal": 2.5e9},
    "balancing": "aux_loss 0.01, z_loss 0.001",
}


def evaluation(name: str, likelihoods: list[float], accuracies: list[float]) -> dict[str, Any]:
    """Return an evaluation of 100-byte windows and of questions. The report must print its values."""
    items = items_of(name, [[-1.0, -2.0]] * len(accuracies), accuracies, likelihoods, size_bytes=100)["items"]
    bits = -fmean(likelihoods) / 100 / math.log(2)
    return {
        "name": name,
        "model": {"folder": f"models/{name}", "class": "LlamaForCausalLM", "parameters": 1, "config_sha256": ""},
        "suite": {"config": {}},
        "settings": {"dtype": "float32", "device": "cpu", "batch_size": 8, "limit": None},
        "versions": {"lm_eval": "0.4.13"},
        "seconds": {"load": 1.0, "total": 2.0},
        "metrics": {
            "heldout_perplexity/bits_per_byte": {"value": bits, "stderr": 0.0321, "higher_is_better": False},
            "quiz/acc": {"value": fmean(accuracies), "stderr": 0.25, "higher_is_better": True},
        },
        "items": {"heldout_perplexity": items["text"], "quiz": items["quiz"]},
        "groups": {},
    }


EVALUATIONS = {
    "dense": evaluation("dense", [-110.0, -120.0, -130.0], [1.0, 0.0, 0.0, 0.0]),
    "step0": evaluation("step0", [-110.0, -120.0, -130.13], [1.0, 0.0, 0.0, 1.0]),
    "trained": evaluation("trained", [-100.0, -111.0, -121.0], [1.0, 0.0, 1.0, 0.0]),
    "dense_ct": evaluation("dense_ct", [-98.0, -109.1, -118.9], [1.0, 0.0, 0.0, 0.0]),
}


def metrics(stage: str) -> list[dict[str, Any]]:
    """Return the metrics of three steps of 1000 tokens; validation losses have their own lines, as in a training."""
    offset = 0.0 if stage == "pretrain" else 0.5
    loads = [[[0.7, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]], [[0.25] * 4, [0.0] * 4], [[0.3, 0.2, 0.3, 0.2], [0.0] * 4]]
    lines: list[dict[str, Any]] = []
    for step in (1, 2, 3):
        line = {"step": step, "loss": 3.5 - step / 4 + offset, "lr": 1e-4, "grad_norm": 1.0, "tokens": 1000 * step}
        load = {"expert_load": loads[step - 1]} if stage == "pretrain" else {}
        lines.append({**line, "seconds": 2.0, "tokens_per_s": 500.0, "memory_gib": 2.5, **load})
        lines.append({"step": step, "validation_loss": 3.625 - step / 8 + offset})
    return lines


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run without its report, for a test to change."""
    return write_run(tmp_path / "demo")


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with its report; do not modify."""
    folder = write_run(tmp_path_factory.mktemp("reported") / "demo")
    write_report(folder)
    return folder


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with 300 steps and its report, enough for verdicts and alarms."""
    folder = lengthen(write_run(tmp_path_factory.mktemp("judged") / "demo"))
    write_report(folder)
    return folder


def lengthen(folder: Path) -> Path:
    """Multiply the step numbers of a run's trainings by a hundred, and return its folder."""
    for path in folder.glob("*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line | {"step": 100 * line["step"]}) + "\n" for line in lines))
    return folder


def write_run(folder: Path) -> Path:
    """Write the files that the stages of a run leave, and return the run's folder."""
    (folder / "evaluation").mkdir(parents=True)
    (folder / "receipt.json").write_text(json.dumps(RECEIPT))
    (folder / "pipeline.json").write_text(json.dumps(PLAN))
    for name, value in EVALUATIONS.items():
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(value))
    for stage, seconds in (("pretrain", 61.0), ("dense_ct", 30.0)):
        (folder / stage).mkdir()
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(stage)))
        (folder / stage / "training.json").write_text(json.dumps(SETTINGS))
        marker = {"stage": stage, "seconds": seconds, "outputs": {}}
        (folder / stage / "_SUCCESS.json").write_text(json.dumps(marker))
    return folder
