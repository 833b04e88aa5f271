"""`nemo upcycle pipeline ... --dryrun` and `--render` as a user types them: no cluster, no network, no dense model."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.functional.command import NEMO, run


pytestmark = [pytest.mark.slow, pytest.mark.full]
SECRET = "run.executor.env_vars={HF_TOKEN: hf_abc}"
CHAIN = ("upcycle", "pipeline", "--factory", "llama3_8b_e8t2")
SLURM = ("run.executor=slurm", "run.executor.account=me")
SITES = {
    "slurm": (*SLURM, "run.executor.partition=h100", "run.executor.container_image=a"),
    "kubernetes": (
        *("run.executor=kubernetes", "run.executor.image=a"),
        *("run.executor.claim=b", "run.executor.mount_path=DIR"),
    ),
}


def _run(folder: Path, *words: str) -> str:
    """Return what the command prints."""
    done = run([NEMO, *CHAIN, *words], folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_dry_run_says_what_has_to_be_known_and_writes_nothing(tmp_path: Path) -> None:
    text = _run(tmp_path, f"dir={tmp_path}/run", "pretrain.trainer.max_steps=5000", *SLURM, SECRET, "--dryrun")
    for words in (
        "47.49B, 13.67B active",
        "60.0 of 79.1 GiB: fits",
        "619.22 GiB every 1,000 steps, 3 at once",
        "Slurm: 64 nodes x 8 ranks",
        "e8t2 after 15T + 21B tokens: no fitted law applies",
        f"--- {tmp_path}/run/jobs/pretrain/pretrain.sh\n#!/bin/bash\n",
        "Before it can be submitted: run.executor.partition: got nothing",
    ):
        assert words in text
    assert re.search(r"pretrain\.trainer\.max_steps +5000\n", text)
    assert "hf_abc" not in text
    assert max(map(len, text.partition("\n--- ")[0].splitlines())) < 120
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_an_executor_forecasts_and_says_what_to_name(tmp_path: Path) -> None:
    text = _run(tmp_path, f"dir={tmp_path}/run", "--dryrun")
    for words in (
        "60.0 of 79.1 GiB: fits",
        "12.9 h, 6,630 GPU-hours",
        "no executor named: 64 nodes x 8 ranks",
        "Before it can run here: ",
        "run.executor=NAME",
    ):
        assert words in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("site", SITES)
def test_rendered_jobs_come_with_their_plan(tmp_path: Path, site: str) -> None:
    words = [word.replace("DIR", str(tmp_path)) for word in SITES[site]]
    text = _run(tmp_path, f"dir={tmp_path}/run", *words, SECRET, "--render", "out", "--yes")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"pipeline.json"} < written
    assert len(written) == 9 + ("submit.sh" in written)  # eight stages and the plan
    assert "copy out/pipeline.json there before you submit them" in text
    assert not (tmp_path / "run").exists()
    assert "hf_abc" not in text
    secret = [path for path in (tmp_path / "out").iterdir() if "hf_abc" in path.read_text()]
    assert len(secret) >= 8
    assert not any(path.stat().st_mode & 0o077 for path in secret)
    assert ("submit.sh" in written) is (site == "slurm")
    if site == "slurm":
        subprocess.run(["bash", "-n", tmp_path / "out/submit.sh"], check=True)
