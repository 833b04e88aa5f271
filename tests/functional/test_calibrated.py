"""The chain, and a grid's training, with a router of prompts: the run makes its own calibration file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.init.calibration_file import NAME, Calibration
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.files import read_json
from tests.functional.test_pipeline import run_in_own_process
from tests.functional.tiny import shrink, write_finished_inputs


pytestmark = pytest.mark.slow


def write_prompts(folder: Path) -> str:
    """Write a text for each of eight copies; return the file's path."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.yaml").write_text("".join(f"- the {word} of it\n" for word in "abcdefgh"))
    return str(folder / "prompts.yaml")


def _recipe(folder: Path) -> Any:
    from nemo_upcycle.recipes import smollm2_135m_e8t2

    recipe = shrink(smollm2_135m_e8t2.pretrain_recipe(num_gpus_per_node=2), max_steps=2, checkpoint_every=2)
    spec = recipe.resume.restore_config.spec
    spec.router_init, spec.router_prompts = "prompts", write_prompts(folder)
    return recipe


def test_a_chain_makes_its_own_calibration_and_trains_with_it(tmp_path: Path) -> None:
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe

    folder, run_dir = write_finished_inputs(tmp_path / "inputs"), tmp_path / "run"
    named = [str(folder / name) for name in ("parent", "blend", "evaluation.yaml")]
    RunPlan("tiny", *named, dump_recipe(_recipe(folder)), None).write(run_dir)
    for stage in ("import", "data", "upcycle", "pretrain"):
        answer = run_in_own_process(stage, run_dir, ranks=2 if stage == "pretrain" else 1)
        assert answer.status == 0, answer.text
    step0, trained = read_json(run_dir / "receipt.json"), read_json(run_dir / "pretrain/receipt.json")
    assert step0["within_tolerance"] is True
    digest = Calibration(run_dir / "upcycle" / NAME).sha256
    assert step0["calibration"] == {"path": str(run_dir / "upcycle" / NAME), "sha256": digest}
    assert trained["calibration"] == {"path": str(run_dir / "pretrain" / NAME), "sha256": digest}


def _train(folder: str, text: str) -> None:
    from nemo_upcycle.pipeline.plan import open_training

    training = open_training("nemo", text)
    training.train(Path(folder) / "run", Path(folder) / "inputs/parent", Path(folder) / "inputs/blend")


def test_a_training_by_itself_makes_the_file_on_the_first_rank(tmp_path: Path) -> None:
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from tests.distributed.ranks import run_ranks

    write_finished_inputs(tmp_path / "inputs")
    run_ranks(_train, 2, str(tmp_path), dump_recipe(_recipe(tmp_path)), process_group=False)
    receipt = read_json(tmp_path / "run/receipt.json")
    assert receipt["calibration"]["path"] == str(tmp_path / "run" / NAME)
    assert receipt["ranks"] == 2
