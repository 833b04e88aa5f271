"""A router of prompts in the chain around a training in Bridge: made by the run, and read by all of its ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.init.calibration_file import NAME, Calibration
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.files import read_json
from tests.functional.test_calibrated import write_prompts
from tests.functional.test_pipeline import run_in_own_process
from tests.functional.tiny import write_finished_inputs


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")


def test_a_chain_makes_its_own_calibration_and_trains_with_it(tmp_path: Path) -> None:
    from nemo_upcycle.pipeline.bridge.pipeline import training_of

    folder, run_dir = write_finished_inputs(tmp_path / "inputs"), tmp_path / "run"
    settings = ["spec.router_init=prompts", f"spec.router_prompts={write_prompts(folder)}"]
    settings += ["spec.router_spread=0.5", "train.train_iters=2"]
    training = training_of("tests.bridge.recipes:tiny", settings, gpus=2)
    named = [str(folder / name) for name in ("parent", "blend", "evaluation.yaml")]
    RunPlan("tiny", *named, training.to_text(), None, trainer="bridge").write(run_dir)
    for stage in ("import", "data", "upcycle", "pretrain"):
        answer = run_in_own_process(stage, run_dir, ranks=2 if stage == "pretrain" else 1)
        assert answer.status == 0, answer.text
    step0, trained = read_json(run_dir / "receipt.json"), read_json(run_dir / "pretrain/receipt.json")
    assert step0["within_tolerance"] is True
    digest = Calibration(run_dir / "upcycle" / NAME).sha256
    assert step0["calibration"] == {"path": str(run_dir / "upcycle" / NAME), "sha256": digest}
    assert trained["calibration"] == {"path": str(run_dir / "pretrain" / NAME), "sha256": digest}
    assert trained["spec"]["router_spread"] == 0.5


def test_fields_of_the_spec_are_set_on_the_command_line_and_checked() -> None:
    from nemo_upcycle.pipeline.bridge.pipeline import training_of

    made = training_of(
        "tests.bridge.recipes:tiny", ["spec.moe_layers=0", "spec.seed=7", "train.train_iters=2"], gpus=1
    )
    assert (json.loads(made.changes), made.overrides) == ({"moe_layers": "0", "seed": 7}, ("train.train_iters=2",))
    with pytest.raises(UpcycleError, match="Did you mean 'router_init'"):
        training_of("tests.bridge.recipes:tiny", ["spec.router_int=zero"], gpus=1)
    with pytest.raises(UpcycleError, match=r"pretrain\.spec\.seed: got 'many', expected a whole number"):
        training_of("tests.bridge.recipes:tiny", ["spec.seed=many"], gpus=1)
