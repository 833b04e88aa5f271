"""The job of a stage, its state in the scheduler, and the time that it gets to save."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from nemo_upcycle.trainers.facts import Profile


@dataclass(frozen=True)
class Job:
    """One stage, as a scheduler is asked to run it.

    Args:
        name: the name of the stage.
        run_dir: the run's folder; the stage's own is `run_dir / name`.
        command: the program and its arguments; every rank executes it.
        after: the stages that must be done before it.
        nodes: number of nodes.
        ranks_per_node: processes on each of them.
        is_training: whether it saves checkpoints, is told to stop by SIGTERM, and goes on from the last checkpoint.
        reads: folders and files outside the run's folder that it reads: the dense model, the data, the suite.
        is_resumable: whether a new start goes on where an earlier one stopped; trainings do.
        profile: how a training uses its GPUs; None for other stages, and where it is not known yet.
        gpus: GPUs that each node must have; 0 for a stage that runs without, or where it is not known yet.
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
        """Where what was submitted and what it printed are kept."""
        return self.run_dir / "jobs" / self.name


class Phase(Enum):
    """How far a job is, as its scheduler says; whether it succeeded is told by the stage's marker alone."""

    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class JobState:
    """What a scheduler says of a job.

    Args:
        phase: phase of the job.
        reason: the scheduler's words: why it waits, or how it ended.
        is_abandoned: whether it counts as ended although it may still start, so that it has to be cancelled.
        is_orphaned: whether it ended because the scheduler holds a job that it waits for to have failed.
    """

    phase: Phase
    reason: str = ""
    is_abandoned: bool = False
    is_orphaned: bool = False


@dataclass(frozen=True)
class SaveLimit:
    """A time within which a training has to have saved a checkpoint.

    Args:
        seconds: length of the time.
        what: the setting that makes it so, with its value, for people.
        otherwise: consequence of a save that takes longer.
        fix: the setting that lengthens it, with `{seconds}` in the place of its value.
    """

    seconds: float
    what: str
    otherwise: str
    fix: str
