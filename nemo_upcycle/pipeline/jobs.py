"""The stages of a run as jobs: what each executes, on how many ranks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.inputs import folders_of
from nemo_upcycle.pipeline.executors.base import Job
from nemo_upcycle.pipeline.plan import Plan, Stage
from nemo_upcycle.utils.conf import is_conf_file


def jobs_of(stages: Sequence[Stage], run_dir: Path, plan: Plan, python: str = sys.executable) -> list[Job]:
    """Return the jobs of stages, in their order.

    Args:
        stages: what to run.
        run_dir: the run's folder.
        plan: of the run.
        python: the interpreter where the stages run.
    """
    script = script_of(plan)
    read = [text for text in plan.inputs() if not is_conf_file(text)]  # of those the run's folder keeps copies
    named = [Path(text.removeprefix("hf://")) for text in (*read, *script)]
    texts = folders_of(read_blend(plan.blend)) if plan.blend else []
    reads = tuple(dict.fromkeys(path for path in (*texts, *named) if path.is_absolute()))
    jobs = []
    for stage in stages:
        nodes, ranks = ranks_for(stage, plan)
        command = (python, "-m", "nemo_upcycle.pipeline", stage.name, str(run_dir), *script)
        kind = {"is_training": stage.parallel, "is_resumable": stage.resumable}
        jobs.append(Job(stage.name, run_dir, command, stage.after, nodes, ranks, **kind, reads=reads))
    return jobs


def ranks_for(stage: Stage, plan: Plan) -> tuple[int, int]:
    """Return the number of nodes and of ranks on each that a stage takes; its recipe says it."""
    training = plan.training(stage.name) if stage.parallel else None
    return training.ranks if training else (1, 1)


def script_of(plan: Plan) -> list[str]:
    """Return the script that was started, if a recipe refers to something defined in it."""
    trainings = [training for stage in plan.stages if (training := plan.training(stage.name))]
    return list(dict.fromkeys(script for training in trainings if (script := training.script)))
