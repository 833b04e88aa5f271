"""The checkpoint from which NeMo's own `AutoResume` starts, for every state that a kill leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from nemo.utils.app_state import AppState

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.sources.checkpoints import ASIDE
from nemo_upcycle.trainers.nemo.resume import UpcycleResume
from nemo_upcycle.trainers.nemo.upcycling import UpcycleConfig
from tests.distributed.ranks import run_ranks
from tests.models import write_llama, write_tokenizer
from tests.unit.sources.test_checkpoints import write


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259))


@pytest.fixture
def checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(AppState(), "log_dir", tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return folder


def _choose(dense: Path) -> Path | None:
    config = UpcycleConfig(path=str(dense))
    resume = UpcycleResume(restore_config=config, resume_if_exists=True, resume_ignore_no_checkpoint=True)
    weights = resume.get_trainer_ckpt_path()
    return None if weights is None else weights.parent


def _mark(checkpoint: Path) -> Path:
    checkpoint.with_name(checkpoint.name + "-unfinished").touch()
    return checkpoint


def test_killed_in_its_first_save_a_run_starts_again(dense: Path, checkpoints: Path) -> None:
    (_mark(checkpoints / "model_name=0--step=1-last") / "weights").mkdir(parents=True)
    assert _choose(dense) is None


def test_chooses_the_highest_complete_step(dense: Path, checkpoints: Path) -> None:
    earlier, chosen = write(checkpoints, 9), write(checkpoints, 11)
    numbered, half = write(checkpoints, 9, ending=""), _mark(write(checkpoints, 13))
    (checkpoints / "model_name=0--step=7-last" / "weights").mkdir(parents=True)  # half removed
    assert _choose(dense) == chosen
    assert _choose(dense) == chosen
    left = [path.name for path in checkpoints.iterdir() if path.is_dir()]
    # The user's numbered checkpoint stays, and NeMo itself deletes the unfinished one.
    assert sorted(left) == sorted([chosen.name, numbered.name, half.name])
    aside = checkpoints.parent / ASIDE
    assert sorted(path.name for path in aside.iterdir()) == sorted([earlier.name, "model_name=0--step=7-last"])


def test_leaves_checkpoints_without_a_step_to_nemo(dense: Path, checkpoints: Path) -> None:
    """Each save overwrites a checkpoint that has no step in its name, so an unfinished checkpoint means lost work."""
    write(checkpoints, 9).rename(checkpoints / "model-last")
    assert _choose(dense) == checkpoints / "model-last"
    _mark(checkpoints / "model-last")
    with pytest.raises(ValueError, match="unfinished"):
        _choose(dense)


def _chosen_by_rank(folders: list[str], dense: str) -> tuple[str, str, int]:
    """Resume on a rank with its own folder; return the chosen checkpoint, the error, and the group size."""
    import os

    import torch
    from nemo import lightning as nl

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.trainers.nemo.upcycling import UpcycleStrategy

    use_cpu_backend()
    rank = int(os.environ["RANK"])
    trainer = nl.Trainer(accelerator="cpu", devices=len(folders), max_steps=1, strategy=UpcycleStrategy())
    resume = UpcycleResume(
        restore_config=UpcycleConfig(path=dense),
        resume_from_directory=folders[rank],
        resume_if_exists=True,
        resume_ignore_no_checkpoint=True,
    )
    error = ""
    try:
        resume.setup(trainer)
    except CheckpointError as refused:
        error = str(refused)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=len(folders), store=trainer.strategy.store)
    return str(trainer.ckpt_path or ""), error, torch.distributed.get_world_size()


def test_the_first_rank_chooses_for_ranks_with_stale_folders(dense: Path, tmp_path: Path) -> None:
    now, stale, empty = (tmp_path / name for name in ("now", "stale", "empty"))
    chosen = write(now, 7)
    write(stale, 6)
    empty.mkdir()
    answers = run_ranks(_chosen_by_rank, 3, [str(now), str(stale), str(empty)], str(dense), process_group=False)
    assert answers == [(str(chosen / "weights"), "", 3)] * 3
    assert (stale / "model_name=0--step=6-last").is_dir()


def test_what_the_first_rank_refuses_every_rank_refuses(dense: Path, tmp_path: Path) -> None:
    next((write(tmp_path / "damaged", 9) / "weights").glob("*.distcp")).unlink()
    write(tmp_path / "whole", 9)
    folders = [str(tmp_path / "damaged"), str(tmp_path / "whole")]
    answers = run_ranks(_chosen_by_rank, 2, folders, str(dense), process_group=False)
    assert {path for path, _, _ in answers} == {""}
    assert all("step=9-last lacks files" in error for _, error, _ in answers)
