"""The job of a stage, its state in the scheduler, and the time limit for a save."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from nemo_upcycle.trainers.facts import Profile


@dataclass(frozen=True)
class Job:
    """One stage, as a scheduler runs it.

    Args:
        name: name of the stage.
        run_dir: the run's folder; the stage's folder is `run_dir / name`.
        command: program and its arguments; every rank executes it.
        after: stages that must be done before this stage.
        nodes: number of nodes.
        ranks_per_node: processes per node.
        is_training: whether the stage saves checkpoints, stops on SIGTERM, and resumes from the last checkpoint.
        reads: folders and files outside the run's folder that the stage reads: the dense model, the data, the suite.
        is_resumable: whether a new start resumes the work of an earlier start, as trainings do.
        profile: how a training uses its GPUs; None for other stages, or if this use is unknown.
        gpus: GPUs that each node must have; 0 if the stage needs no GPUs, or if the number is unknown.
    """

    name: str
    run_dir: Path
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 1
    is_training: bool = False
    is_resumable: bool = False
    reads: tuple[Path, ...] = ()
    profile: Profile | None = None
    gpus: int = 0

    @property
    def folder(self) -> Path:
        """Folder for the submitted files and the logs of the job."""
        return self.run_dir / "jobs" / self.name


class Phase(Enum):
    """Progress of a job according to its scheduler. Only the stage's marker tells whether the job succeeded."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class JobState:
    """State of a job according to its scheduler.

    Args:
        phase: phase of the job.
        reason: the scheduler's text about why the job waits or how the job ended.
        is_abandoned: whether the job counts as ended although it may still start, so that it has to be cancelled.
        is_orphaned: whether the job ended because the scheduler regards an earlier job as failed.
    """

    phase: Phase
    reason: str = ""
    is_abandoned: bool = False
    is_orphaned: bool = False


@dataclass(frozen=True)
class SaveLimit:
    """Time within which a training must have saved a checkpoint.

    Args:
        seconds: length of the time.
        what: setting that causes the limit, with its value, for people.
        otherwise: consequence of a save that takes longer.
        fix: setting that lengthens the time, with `{seconds}` in place of its value.
    """

    seconds: float
    what: str
    otherwise: str
    fix: str
