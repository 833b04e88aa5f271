"""The jobs of a run's stages: command, ranks, GPUs, and the files that each stage reads."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.plan import Stage, WorkPlan
from nemo_upcycle.trainers.facts import TrainingFacts


#: A training with the accelerator `auto` needs GPUs if its model has at least this many parameters. Nobody trains so
#: large a model on CPUs on purpose.
LEAST_FOR_GPUS = 1_000_000_000


def needs_gpus(facts: TrainingFacts | None) -> bool:
    """Return whether a training cannot run without GPUs: its accelerator is `gpu`, or `auto` for a large model.

    Args:
        facts: facts of the training; if they are None (unknown), the answer is False.
    """
    if facts is None:
        return False
    accelerator, is_large = facts.profile.accelerator, facts.arch.total_params >= LEAST_FOR_GPUS
    return accelerator in ("gpu", "cuda") or (accelerator == "auto" and is_large)


def jobs_of(stages: Sequence[Stage], run_dir: Path, plan: WorkPlan, python: str = sys.executable) -> list[Job]:
    """Return the jobs of stages, in the order of the stages.

    Args:
        stages: stages to run.
        run_dir: the run's folder.
        plan: plan of the run.
        python: interpreter that runs the stages.
    """
    # Scripts that started the run, if a recipe refers to something defined in them.
    scripts = list(dict.fromkeys(script for training in plan.trainings.values() if (script := training.script)))
    reads = (*plan.inputs.paths, *(path for path in map(Path, scripts) if path.is_absolute()))
    on_gpus = any(map(needs_gpus, plan.facts.values()))
    jobs = []
    for stage in stages:
        training = plan.trainings.get(stage.name) if stage.parallel else None
        nodes, ranks = training.ranks if training else (1, 1)
        facts = plan.facts[stage.name] if training else None
        profile = facts.profile if facts else None
        command = (python, "-m", "nemo_upcycle.pipeline", stage.name, str(run_dir), *scripts)
        gpus = ranks if needs_gpus(facts) else int(stage.computes and on_gpus)
        about: dict[str, Any] = {"is_training": stage.parallel, "is_resumable": stage.resumable, "reads": reads}
        about |= {"profile": profile, "gpus": gpus}
        jobs.append(Job(stage.name, run_dir, command, stage.after, nodes, ranks, **about))
    return jobs
