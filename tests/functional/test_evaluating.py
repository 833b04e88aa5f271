"""The live model is evaluated on its own ranks: as its checkpoint is, and without a trace in the training."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.evaluation.compare import compare_items
from nemo_upcycle.evaluation.run import evaluate
from tests.functional.runs import Runs
from tests.tiers import quick


pytestmark = pytest.mark.slow
SUITE = """
tasks: {heldout_perplexity: [0]}
heldout: {window_bytes: 60, windows: 9}
dtype: float32
"""
#: The last one drops tokens in training, which neither the evaluation nor the export may do.
LAYOUTS = [(1, {}), (2, {"ep": 2}), (2, {"tp": 2}), (2, {"pp": 2}), (2, {"ep": 2, "padded_capacity": 1.0})]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("evaluating"))
    (runs.folder / "suite.yaml").write_text(SUITE)
    return runs


def _train(runs: Runs, name: str, ranks: int, layout: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    return runs.train(name, ranks, steps=4, every=2, **layout, **options)


def _evaluations(lines: list[dict[str, Any]]) -> dict[int, float]:
    found = {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}
    return {step: values["heldout_perplexity/bits_per_byte"]["value"] for step, values in found.items()}


@pytest.mark.parametrize(("ranks", "layout"), quick(LAYOUTS, (2, {"ep": 2, "padded_capacity": 1.0})), ids=str)
def test_the_numbers_are_those_of_the_exported_checkpoint(runs: Runs, ranks: int, layout: dict[str, Any]) -> None:
    name = f"run of {ranks} {layout}"
    watch = {"suite": str(runs.folder / "suite.yaml"), "every_n_steps": 2}
    lines = _train(runs, name, ranks, layout, evaluate=watch)
    folder = runs.folder / name
    assert sorted(_evaluations(lines)) == [0, 2, 4]
    live = json.loads((folder / "evaluation/step=4.json").read_text())
    export_checkpoint(runs.checkpoint(name), runs.parent, folder / "hf", dtype=torch.float32)
    suite = folder / "evaluation/suite"
    offline = evaluate(folder / "hf", suite, folder / "offline", name="trained", samples=False)
    assert compare_items(offline, live)["max_relative_loglikelihood_difference"] < 2e-5
    start = json.loads((folder / "evaluation/step=0.json").read_text())
    parent = evaluate(runs.parent, suite, folder / "offline", name="parent", samples=False)
    assert compare_items(parent, start)["max_relative_loglikelihood_difference"] < 2e-5
    assert _evaluations(lines)[4] == live["metrics"]["heldout_perplexity/bits_per_byte"]["value"]


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "layout"),
    [(2, {"ep": 2}), (2, {"ep": 2, "padded_capacity": 1.0}), (2, {"tp": 2}), (2, {"pp": 2})],
    ids=str,
)
def test_a_training_has_the_same_bits_with_and_without_it(runs: Runs, ranks: int, layout: dict[str, Any]) -> None:
    """With padded capacity the dispatchers keep how they exchange tokens, which an evaluation does otherwise."""
    watch = {"suite": str(runs.folder / "suite.yaml"), "every_n_steps": 1, "batch_size": 2}
    name = f"{layout}".replace("'", "")
    watched = _train(runs, f"watched {name}", ranks, layout, evaluate=watch)
    alone = _train(runs, f"alone {name}", ranks, layout)
    numbers = ("step", "loss", "grad_norm", "expert_load", "router")
    steps = [{name: line[name] for name in numbers} for line in watched if "loss" in line]
    assert steps == [{name: line[name] for name in numbers} for line in alone if "loss" in line]
    assert _weights(runs.checkpoint(f"watched {name}")) == _weights(runs.checkpoint(f"alone {name}"))


@pytest.mark.full
def test_a_step_that_a_stop_left_unscored_is_scored_by_the_next_start(runs: Runs) -> None:
    watch = {"suite": str(runs.folder / "suite.yaml"), "every_n_steps": 2}
    for step in (1, 3):  # before the first checkpoint, which forgets the line of step 0; and after it
        with pytest.raises(RuntimeError, match="rank 0 died"):
            _train(runs, "killed", 1, {}, evaluate=watch, kill=step)
    folder = runs.folder / "killed/evaluation"
    (folder / "step=2.json").unlink()
    (folder / "step=4.json").write_text("{}")  # of a future that is abandoned
    lines = _train(runs, "killed", 1, {}, evaluate=watch)
    assert sorted(_evaluations(lines)) == [0, 2, 4]
    assert json.loads((folder / "step=4.json").read_text())["name"] == "step 4"


def _weights(checkpoint: Path) -> dict[str, Any]:
    from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint

    with DistributedCheckpoint(checkpoint / "weights") as saved:
        names = [name for name in saved.names() if not any(part in name for part in ("optimizer", "rng", "_extra"))]
        tensors = {name: saved.read(name, [(0, size) for size in saved.shape(name)]) for name in names}
        return {name: hashlib.sha256(tensor.float().numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
