"""The stages of a run as jobs: what each executes, on how many ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.inputs import folders_of
from nemo_upcycle.pipeline.executors.base import Cluster, Job, is_local
from nemo_upcycle.pipeline.executors.performance import PerformanceSetting, settings_here
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
    dense, *_ = plan.inputs()
    texts = folders_of(read_blend(plan.blend)) if plan.blend else []
    reads = tuple(dict.fromkeys(path for path in (*texts, *named) if path.is_absolute()))
    jobs = []
    for stage in stages:
        training = plan.training(stage.name) if stage.parallel else None
        nodes, ranks = training.ranks if training else (1, 1)
        facts = training.facts(dense) if training else None
        profile = facts.profile if facts else None
        command = (python, "-m", "nemo_upcycle.pipeline", stage.name, str(run_dir), *script)
        kind = {"is_training": stage.parallel, "is_resumable": stage.resumable}
        jobs.append(Job(stage.name, run_dir, command, stage.after, nodes, ranks, **kind, reads=reads, profile=profile))
    return jobs


def performance_of(
    jobs: Iterable[Job], cluster: Cluster | None, executor: Any
) -> dict[str, Sequence[PerformanceSetting]]:
    """Return the performance settings of the trainings among jobs, by stage.

    Args:
        jobs: of a run.
        cluster: where they run; None: this machine, or an executor of others, which is left as it is.
        executor: the user's.
    """
    here = settings_here if is_local(executor) else lambda _: []
    find = cluster.performance if cluster else here
    return {job.name: find(job) for job in jobs if job.is_training}


def script_of(plan: Plan) -> list[str]:
    """Return the script that was started, if a recipe refers to something defined in it."""
    trainings = [training for stage in plan.stages if (training := plan.training(stage.name))]
    return list(dict.fromkeys(script for training in trainings if (script := training.script)))
