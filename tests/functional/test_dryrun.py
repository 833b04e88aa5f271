"""`nemo upcycle pipeline ... --dryrun` and `--render`, typed without a cluster, a network or a dense model.

`tests/golden/forecast` has complete forecasts.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.functional.typed import Answer, type_commands


pytestmark = [pytest.mark.slow, pytest.mark.full]
SECRET = "run.executor.env_vars={HF_TOKEN: hf_abc}"
SLURM = ("run.executor=slurm", "run.executor.account=me")
SITES = {
    "slurm": (*SLURM, "run.executor.partition=h100", "run.executor.container_image=a"),
    "kubernetes": (
        *("run.executor=kubernetes", "run.executor.image=a"),
        *("run.executor.claim=b", "run.executor.mount_path=DIR"),
    ),
}


def _type(folder: Path, *commands: tuple[str, ...], status: int = 0) -> list[Answer]:
    """Type commands one after the other; each must end with `status` and show no secret."""
    chain = ("upcycle", "pipeline", "--factory", "llama3_8b_e8t2", f"dir={folder}/run")
    typed = [[word.replace("DIR", str(folder)) for word in (*chain, *words)] for words in commands]
    (answers,) = run_ranks(type_commands, 1, typed, str(folder), str(folder), process_group=False)
    for answer in answers:
        assert answer.status == status, answer.text
        assert "hf_abc" not in answer.text
    return answers


def test_a_dry_run_names_missing_things_and_writes_nothing(tmp_path: Path) -> None:
    changed = ("pretrain.trainer.max_steps=5000", *SLURM, SECRET, "--dryrun")
    submitted, here = _type(tmp_path, changed, ("--dryrun",), status=1)
    assert re.search(r"pretrain\.trainer\.max_steps +5000\n", submitted.text)
    assert re.search(r"\nIt would not start:\n  - run\.executor\.partition is missing", submitted.text)
    assert "12.9 h, 6,630 GPU-hours" in here.text
    assert re.search(r"\nIt would not start:\n  - pretrain\.trainer\.num_nodes is 64", here.text)
    assert max(len(answer.text.splitlines()) for answer in (submitted, here)) <= 68
    assert submitted.written == here.written == []


def test_rendered_jobs_come_with_their_plan(tmp_path: Path) -> None:
    answers = _type(tmp_path, *((*words, SECRET, "--render", site, "--yes") for site, words in SITES.items()))
    for site, answer in zip(SITES, answers, strict=True):
        written = {path.name: path for path in (tmp_path / site).iterdir()}
        assert len(written) == (10 if site == "slurm" else 9)  # eight stages, the plan, Slurm's submit.sh
        assert f"copy {site}/pipeline.json there before you submit them" in answer.text
        assert not (tmp_path / "run").exists()
        secret = [path for path in written.values() if "hf_abc" in path.read_text()]
        assert len(secret) >= 8
        assert not any(path.stat().st_mode & 0o077 for path in secret)
    subprocess.run(["bash", "-n", tmp_path / "slurm/submit.sh"], check=True)
