"""`python -m nemo_upcycle.evaluation` is lm-eval's own command with one model more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.lm_eval_tasks import write_task
from tests.unit.evaluation.conftest import QUESTIONS
from tests.unit.evaluation.test_run import OWN


@pytest.mark.full
@pytest.mark.parametrize("model", ["hf", "nemo_upcycle"])
def test_lm_evals_own_models_and_ours_are_known(tiny_llama: Path, tmp_path: Path, model: str) -> None:
    write_task(tmp_path, "quiz", {"test": QUESTIONS}, **OWN)
    named = "pretrained" if model == "hf" else "checkpoint"
    command = [sys.executable, "-m", "nemo_upcycle.evaluation", "run", "--model", model]
    command += ["--model_args", f"{named}={tiny_llama}", "--tasks", "quiz", "--include_path", str(tmp_path)]
    done = subprocess.run([*command, "--device", "cpu"], capture_output=True, text=True, check=False)
    assert "no model for this name" not in done.stderr
    if model == "hf":
        assert done.returncode == 0, done.stderr
        assert "|quiz |" in done.stdout
    else:  # it takes checkpoints, and says so
        assert "checkpoint" in done.stderr.splitlines()[-1]
