"""A router of prompts: the run makes its own calibration file, by the chain and without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.init.calibration_file import NAME, Calibration
from nemo_upcycle.utils.files import read_json
from tests.contract.trainers import train, training_text, write_plan
from tests.functional.stages import run_stages
from tests.functional.tiny import write_finished_inputs


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a parent, its tokenised texts, a suite, and a prompt for each of eight copies."""
    folder = write_finished_inputs(tmp_path_factory.mktemp("inputs"))
    (folder / "prompts.yaml").write_text("".join(f"- the {word} of it\n" for word in "abcdefgh"))
    return folder


def _text(inputs: Path) -> str:
    settings: dict[str, Any] = {"spec.router_init": "prompts", "spec.router_prompts": str(inputs / "prompts.yaml")}
    return training_text(settings | {"spec.router_spread": 0.5, "steps": 2}, ranks=2)


def test_a_chain_makes_its_own_calibration_and_trains_with_it(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    write_plan(run_dir, inputs / "parent", inputs / "blend", inputs / "evaluation.yaml", _text(inputs))
    run_stages(run_dir, ("import", "data", "upcycle", "pretrain"), ranks=2)
    step0, trained = read_json(run_dir / "receipt.json"), read_json(run_dir / "pretrain/receipt.json")
    assert step0["within_tolerance"] is True
    digest = Calibration(run_dir / "upcycle" / NAME).sha256
    assert step0["calibration"] == {"path": str(run_dir / "upcycle" / NAME), "sha256": digest}
    assert trained["calibration"] == {"path": str(run_dir / "pretrain" / NAME), "sha256": digest}
    assert (trained["spec"]["router_spread"], trained["ranks"]) == (0.5, 2)


@pytest.mark.full
def test_a_training_by_itself_makes_the_file_on_the_first_rank(inputs: Path, tmp_path: Path) -> None:
    train(_text(inputs), tmp_path / "run", inputs / "parent", inputs / "blend", ranks=2)
    assert read_json(tmp_path / "run/receipt.json")["calibration"]["path"] == str(tmp_path / "run" / NAME)
