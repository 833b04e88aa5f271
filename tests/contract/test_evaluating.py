"""An evaluation of the live model gives the same scores as its checkpoint, and does not change the training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.evaluation.compare import compare_items
from nemo_upcycle.evaluation.run import evaluate
from nemo_upcycle.trainers.base import last_checkpoint
from tests.contract.trainers import IS_BRIDGE, differing, losses, metrics, train, training_text, weights
from tests.functional.tiny import prepare
from tests.tiers import quick


pytestmark = [pytest.mark.slow, pytest.mark.full]
SUITE = "tasks: {heldout_perplexity: [0]}\nheldout: {window_bytes: 60, windows: 9}\ndtype: float32\n"
BITS = "heldout_perplexity/bits_per_byte"
#: Settings that drop tokens in training; neither the evaluation nor the export may drop them.
PADDED = {"ep": 2, "model.moe_expert_capacity_factor": 1.0, "model.moe_pad_expert_input_to_capacity": True}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [(2, {"tp": 2}), (2, {"pp": 2}), (2, PADDED)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent and its tokenised texts, next to a suite."""
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "suite.yaml").write_text(SUITE)
    return prepare(folder, vocab_size=260 if IS_BRIDGE else 259)  # NeMo scores only the tokenizer's rows


def _train(
    inputs: tuple[Path, Path], folder: Path, layout: dict[str, Any], ranks: int = 1, every: int = 2, kill_at: int = 0
) -> Path:
    """Train four steps, and evaluate every `every` steps, or never if `every` is 0."""
    watch = {"suite": str(inputs[0].parent / "suite.yaml"), "every_n_steps": every} if every else None
    text = training_text({"steps": 4} | layout, ranks=ranks, evaluate=watch)
    train(text, folder, *inputs, ranks=ranks, kill_at=kill_at)
    return folder


@pytest.mark.parametrize(("ranks", "layout"), quick(LAYOUTS, (2, PADDED)), ids=str)
def test_the_numbers_are_those_of_the_exported_checkpoint(
    inputs: tuple[Path, Path], tmp_path: Path, ranks: int, layout: dict[str, Any]
) -> None:
    folder = _train(inputs, tmp_path / "run", layout, ranks)
    lines = {line["step"]: line["evaluation"] for line in metrics(folder, "evaluation")}
    assert sorted(lines) == [0, 2, 4]
    parent, suite = inputs[0], folder / "evaluation/suite"
    export_checkpoint(last_checkpoint(folder), parent, folder / "hf", dtype=torch.float32)
    for step, model in ((4, folder / "hf"), (0, parent)):
        live = json.loads((folder / f"evaluation/step={step}.json").read_text())
        offline = evaluate(model, suite, folder / "offline", name=f"of {step}", samples=False)
        assert compare_items(offline, live)["max_relative_loglikelihood_difference"] < 2e-5
        assert lines[step][BITS]["value"] == live["metrics"][BITS]["value"]


@pytest.mark.parametrize(("ranks", "layout"), quick(LAYOUTS, (2, {"tp": 2}), (2, PADDED)), ids=str)
def test_a_training_has_the_same_bits_with_and_without_it(
    inputs: tuple[Path, Path], tmp_path: Path, ranks: int, layout: dict[str, Any]
) -> None:
    """With padded capacity, a dispatcher stores its way to exchange tokens, and an evaluation needs another way."""
    watched, alone = (_train(inputs, tmp_path / f"{every}", layout, ranks, every) for every in (1, 0))
    for name in ("loss", "grad_norm", "expert_load", "router"):
        assert losses(watched, name) == losses(alone, name), name
    assert differing(weights(watched), weights(alone)) == []


def test_an_unscored_step_is_scored_by_the_next_start(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for kill_at in (2, 5):  # before the first checkpoint (the line of step 0 is lost), and after a checkpoint
        with pytest.raises(RuntimeError, match="rank 0 died"):
            _train(inputs, run, {}, kill_at=kill_at)
    (run / "evaluation/step=2.json").unlink()
    (run / "evaluation/step=4.json").write_text("{}")  # left over from steps that are trained again
    _train(inputs, run, {})
    assert sorted({line["step"] for line in metrics(run, "evaluation")}) == [0, 2, 4]
    for step in (2, 4):
        assert json.loads((run / f"evaluation/step={step}.json").read_text())["name"] == f"step {step}"
