"""`python -m nemo_upcycle.evaluation` is lm-eval's own command with one model more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml


@pytest.mark.full
@pytest.mark.parametrize("model", ["hf", "nemo_upcycle"])
def test_lm_evals_own_models_and_ours_are_known(tiny_llama: Path, tmp_path: Path, model: str) -> None:
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": 1, "choices": ["1", "2"]}))
    task = {"task": "quiz", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    task |= {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "quiz.jsonl")}}}
    task |= {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "doc_to_target": "answer"}
    task |= {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    (tmp_path / "quiz.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
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
