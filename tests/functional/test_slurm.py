"""The chain as jobs of a real Slurm with two nodes and accounting, where there is one.

SLURM_ACCOUNT=me SLURM_PARTITION=debug python -m pytest tests/functional/test_slurm.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_upcycle.utils.files import MARKER
from tests.functional.test_pipeline import EVALUATION, STAGES
from tests.functional.tiny import write_parent, write_texts


ROOT = Path(__file__).parents[2]


def _answers(*command: str) -> bool:
    return bool(shutil.which(command[0])) and not subprocess.run(command, capture_output=True, check=False).returncode


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (_answers("sinfo") and _answers("sacct")), reason="no Slurm with accounting"),
]


def _run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    if not (folder / "parent").exists():
        write_parent(folder / "parent")
        write_texts(folder / "texts")
        (folder / "evaluation.yaml").write_text(EVALUATION.replace("WINDOWS", "4"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"NEMORUN_HOME": str(folder / "home"), "PATH": path, "PYTHONPATH": str(ROOT)}
    script = str(ROOT / "tests/functional/slurm_cluster.py")
    factory = f"tiny(inputs='{folder}', dir='{folder}/run')"
    command = [sys.executable, script, "--factory", factory, "run.executor=cluster", *words, "--yes"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)


def test_every_stage_is_a_job(tmp_path: Path) -> None:
    done = _run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((tmp_path / "run" / name / MARKER).is_file() for name in STAGES)


def test_a_failed_stage_takes_the_rest_out_of_the_queue(tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("the state of our union")
    (tmp_path / "other.txt").write_text("the state of our union")  # held out, so that nothing is left to train on
    (tmp_path / "same.yaml").write_text("sources: {mine: {train: [same.txt], heldout: [other.txt]}}\n")
    done = _run(tmp_path, f"data={tmp_path}/same.yaml")
    assert done.returncode == 2
    assert "Stage 'data' did not finish" in done.stderr
    time.sleep(5)
    queue = subprocess.run(["squeue", "--noheader", "--format=%Z"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in queue.stdout
