"""Forecast which stages of a run are done, resume or start, with the reasons and the resources of each stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.jobs import Job, SaveLimit
from nemo_upcycle.pipeline.markers import CONTENT, changed_inputs
from nemo_upcycle.pipeline.plan import Stage
from nemo_upcycle.pipeline.rewind import Rewind
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.sources.checkpoints import newest_checkpoint, steps_in


#: Texts in place of an executor's name, if a stage has no executor. The second text is for a stage that needs several
#: nodes, because such a stage cannot run on this machine.
THIS_MACHINE, NO_EXECUTOR = "this machine", "no executor named"
#: Reason given for a stage that has left no trace yet.
NOT_RUN = "not run yet"
#: Name of a job's time limit in a cluster's table of resources.
TIME = "time"


class State(Enum):
    """What happens to a stage."""

    DONE = "done"
    RESUME = "resume"
    RUN = "run"


@dataclass(frozen=True)
class Finding:
    """Conclusion from the contents of a stage's folder.

    Args:
        state: what will happen to the stage.
        why: the reason, for people.
        checkpoint: newest complete checkpoint, if the stage resumes from one.
    """

    state: State
    why: str
    checkpoint: Path | None = None

    @property
    def steps_done(self) -> int:
        """Steps of a training that need not be repeated."""
        return steps_in(self.checkpoint) if self.checkpoint else 0


@dataclass(frozen=True)
class StageForecast:
    """The forecast of one stage.

    Args:
        name: name of the stage.
        finding: whether and why the stage runs.
        executor: name of its executor, or this machine.
        nodes: number of nodes.
        ranks_per_node: processes per node.
        resources: amount of each resource that the stage asks the executor for, by the resource's name.
        save_limits: time limits within which a training must save.
        is_requeued: whether the stage continues in another job when the time of its job is over.
        time_setting: field of the executor that sets the time of a job.
        time_fix: fix if this time is too short, with `{stage}` in place of the stage's name.
    """

    name: str
    finding: Finding
    executor: str
    nodes: int
    ranks_per_node: int
    resources: Mapping[str, str] = field(default_factory=dict)
    save_limits: Sequence[SaveLimit] = ()
    is_requeued: bool = False
    time_setting: str = TIME
    time_fix: str = ""

    @property
    def runs(self) -> bool:
        """Whether the stage has anything left to do."""
        return self.finding.state is not State.DONE


def forecast_stages(
    stages: Sequence[Stage],
    run_dir: Path,
    plan: RunPlan,
    cluster: Cluster | None,
    jobs: Mapping[str, Job],
    rewind: Rewind | None = None,
) -> tuple[StageForecast, ...]:
    """Forecast what will happen to each stage.

    Args:
        stages: the chain or a part of it, in order; the stages before this part are done.
        run_dir: the run's folder; need not exist.
        plan: plan of the run.
        cluster: scheduler of the stages; None for this machine.
        jobs: job of each stage, by stage.
        rewind: request to rewind a training, or None.
    """
    findings: dict[str, Finding] = {}
    for stage in stages:
        findings[stage.name] = find(stage, run_dir, plan, findings, rewind)
    return tuple(_stage_forecast(findings[stage.name], jobs[stage.name], cluster) for stage in stages)


def _stage_forecast(finding: Finding, job: Job, cluster: Cluster | None) -> StageForecast:
    if cluster is None:
        here = THIS_MACHINE if job.nodes == 1 else NO_EXECUTOR
        return StageForecast(job.name, finding, here, job.nodes, job.ranks_per_node)
    return StageForecast(
        name=job.name,
        finding=finding,
        executor=cluster.label,
        nodes=job.nodes,
        ranks_per_node=job.ranks_per_node,
        resources=cluster.resources(job),
        save_limits=cluster.save_limits(job) if job.is_training else (),
        is_requeued=cluster.goes_on(job),
        time_setting=cluster.time_setting,
        time_fix=cluster.time_fix,
    )


def find(
    stage: Stage, run_dir: Path, plan: RunPlan, before: Mapping[str, Finding], rewind: Rewind | None = None
) -> Finding:
    """Forecast what will happen to a stage.

    Args:
        stage: the stage.
        run_dir: the run's folder.
        plan: plan of the run.
        before: forecast of each earlier stage, by stage; an earlier stage without a forecast is done.
        rewind: request to rewind a training, or None.
    """
    folder, inputs = stage.folder(run_dir, plan), stage.inputs(run_dir, plan)
    if rewind and rewind.stage == stage.name:
        why = f"rewound to the checkpoint after step {rewind.step:,}"
        return Finding(State.RESUME, why, rewind.checkpoint(folder.path))
    again = [name for name in plan.reads[stage.name] if name in before and before[name].state is not State.DONE]
    for name in again:  # the stage's results are unknown until it has run
        inputs.pop(CONTENT + name, None)
    done = folder.done_from()
    if done is not None and not changed_inputs(done, inputs):
        unless = (
            f", unless {_listed(again)} {'leaves' if len(again) == 1 else 'leave'} something else" if again else ""
        )
        return Finding(State.DONE, f"finished earlier, from the same inputs{unless}")
    started = folder.started_from()
    if stage.resumable and started is not None:
        if not stage.parallel:
            return Finding(State.RESUME, "stopped early; continues from its files")
        checkpoint = newest_checkpoint(folder.path / "checkpoints")
        if checkpoint is None:
            return Finding(State.RUN, "started earlier, but no checkpoint is finished; starts again")
        return Finding(State.RESUME, f"checkpoint after step {steps_in(checkpoint):,}, {checkpoint.name}", checkpoint)
    if done is not None:
        return Finding(State.RUN, f"finished earlier, but {_listed(changed_inputs(done, inputs))} changed")
    if started is not None:
        return Finding(State.RUN, "started earlier and did not finish; starts again")
    if waits := [name for name in stage.after if name in before and before[name].state is not State.DONE]:
        return Finding(State.RUN, f"{NOT_RUN}; {_listed(waits)} {'runs' if len(waits) == 1 else 'run'} first")
    return Finding(State.RUN, NOT_RUN)


def _listed(names: Sequence[str]) -> str:
    """Join the names of a marker's inputs into a phrase, without the prefixes `setting` and `stage`.

    Example:
        >>> _listed(["setting dense", "stage import", "setting data"])
        'dense, import and data'
    """
    plain = list(
        dict.fromkeys(name.removeprefix("setting ").removeprefix("stage ").removeprefix(CONTENT) for name in names)
    )
    return " and ".join([", ".join(plain[:-1]), plain[-1]] if len(plain) > 1 else plain)
