"""Check a stage's Slurm settings for values that `sbatch`, or the job itself, would refuse."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import nemo_run as run

from nemo_upcycle.errors import UpcycleError, failures
from nemo_upcycle.pipeline.executors.base import require_gpus, require_variables
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.utils.validation import is_number, is_whole


class _Form(NamedTuple):
    """The written form of a setting's value."""

    pattern: str
    expected: str
    example: str


_MEMORY = _Form(r"\d+([KMGT]B?)?", "a size such as 64G, or 0 for all of a node's memory", "64G")
_FORMS = {
    "time": _Form(
        r"(?i:infinite|unlimited)|\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}", "minutes, HH:MM:SS or DAYS-HH:MM:SS", "04:00:00"
    ),
    **dict.fromkeys(("mem", "mem_per_cpu", "mem_per_gpu"), _MEMORY),
    "signal": _Form(r"([RB]{1,2}:)?(SIG)?[A-Z0-9]+(@\d{1,5})?", "a signal such as TERM@600", "TERM@600"),
    "open_mode": _Form("append|truncate", "append or truncate", "append"),
}
#: Signals at which the ranks of a resumable stage save and stop. With `B:`, only the batch shell would get the signal.
_STOPS = re.compile(r"(R:)?(SIG)?(TERM|15)(@\d+)?")
#: Settings that are numbers, each with its smallest allowed value.
_COUNTS = {"cpus_per_task": 1, "cpus_per_gpu": 1, "gpus_per_node": 0, "gpus_per_task": 0, "segment": 1}
#: Fields of NeMo-Run's executor that do not fit a job of one stage with one process per rank. A value says what a user
#: does instead of setting the field.
_UNSUPPORTED = {
    "array": "omit it: a stage is one job",
    "heterogeneous": "omit it: all nodes of a stage are alike; differences between stages belong in `stages`",
    "het_group_indices": "omit it: all nodes of a stage are alike",
    "dependencies": "omit it: each stage waits for the stages that it needs",
    "torchrun_nproc_per_node": "omit it: srun starts every rank; set pretrain.trainer.devices",
    "retries": "omit it: a stopped training starts again as long as it makes progress",
    "launcher": "omit it: srun starts every rank; hang_detection=true starts them under ft_launcher",
}


def wrong_values(mine: run.SlurmExecutor, job: Job) -> list[UpcycleError]:
    """List the settings of a stage that a batch script would ignore, or that would fail on the nodes.

    Args:
        mine: executor with the settings of the stage.
        job: job of the stage.
    """
    found = [*_unsupported(mine), *_malformed(mine, job), *_wrong_counts(mine, job), *_wrong_mounts(mine)]
    found += failures([lambda: require_variables(mine.env_vars)])
    if getattr(mine, "counts_gpus", True) and not any(error.subject.endswith("gpus_per_node") for error in found):
        fix = "set it; if this Slurm does not count GPUs (no GRES), set counts_gpus=false"
        found += failures([lambda: require_gpus(job, _gpus_per_node(mine, job), fix)])
    return found


def _of_stage(job: Job, name: str) -> str:
    return f"run.executor.stages.{job.name}.{name}"


def _unsupported(mine: run.SlurmExecutor) -> Iterator[UpcycleError]:
    for name, fix in _UNSUPPORTED.items():
        if value := getattr(mine, name, None):
            yield UpcycleError(
                f"run.executor.{name}", kind="refused", got=f"is {value}, but cannot be set here", fix=fix
            )


def _malformed(mine: run.SlurmExecutor, job: Job) -> Iterator[UpcycleError]:
    for name, form in _FORMS.items():
        value = getattr(mine, name)
        if value is not None and not re.fullmatch(form.pattern, str(value), re.ASCII):
            fix = f"write, for example, {form.example}"
            yield UpcycleError(_of_stage(job, name), got=f"'{value}'", expected=form.expected, fix=fix)
    given = [name for name in ("mem", "mem_per_cpu", "mem_per_gpu") if getattr(mine, name) is not None]
    if len(given) > 1:
        yield UpcycleError(
            " and ".join(_of_stage(job, name) for name in given),
            kind="refused",
            got="cannot be combined",
            expected="sbatch accepts only one of them",
            fix=f"set {_of_stage(job, given[0])}=null, or the others",
        )
    if job.is_resumable and mine.signal and not _STOPS.fullmatch(mine.signal):
        expected = "TERM without B:, because only TERM makes the ranks save, and B: sends the signal to no rank"
        yield UpcycleError(
            _of_stage(job, "signal"), got=mine.signal, expected=expected, fix="write, for example, TERM@600"
        )


def _wrong_counts(mine: run.SlurmExecutor, job: Job) -> Iterator[UpcycleError]:
    for name, least in _COUNTS.items():
        value = getattr(mine, name)
        if value is not None and not is_whole(value, least):
            expected = f"a whole number, {least} or more"
            yield UpcycleError(
                _of_stage(job, name), got=value, expected=expected, fix="correct the number, or omit the setting"
            )
    if not is_number(silence_s := getattr(mine, "silence_s", 1.0), 1):
        yield UpcycleError(_of_stage(job, "silence_s"), got=silence_s, expected="1 or more", fix="raise it")
    for name, own in (("nodes", job.nodes), ("ntasks_per_node", job.ranks_per_node)):
        if (value := getattr(mine, name)) not in (1, own) and job.is_training:
            setting = {"nodes": "num_nodes", "ntasks_per_node": "devices"}[name]
            fix = f"omit it, and set {job.name}.trainer.{setting}={value} (Megatron-Bridge: gpus, gpus_per_node)"
            yield UpcycleError(_of_stage(job, name), got=value, expected=f"{own}, as in the recipe", fix=fix)


def _wrong_mounts(mine: run.SlurmExecutor) -> Iterator[UpcycleError]:
    for mount in mine.container_mounts if mine.container_image else ():
        host, _, rest = mount.partition(":")
        if not host.startswith(("/", "$")) or not (rest or host).startswith(("/", "$")):
            expected = "HOST:CONTAINER, two absolute paths"
            yield UpcycleError(
                "run.executor.container_mounts", got=mount, expected=expected, fix="write, for example, /a:/a"
            )


def _gpus_per_node(mine: run.SlurmExecutor, job: Job) -> int | None:
    """Count the GPUs per node that a job asks Slurm for; None if it asks for GPUs in an unknown number."""
    if mine.gpus_per_node:
        return int(mine.gpus_per_node)
    if mine.gpus_per_task:
        return int(mine.gpus_per_task) * job.ranks_per_node
    named = [part.partition("(")[0].split(":") for part in (mine.gres or "").split(",")]
    counts = [int(last) if (last := words[-1]).isdecimal() else 1 for words in named if words[0] == "gpu"]
    if counts:
        return sum(counts)
    others = (mine.additional_parameters or {}).items()
    return None if any("gpu" in f"{name} {value}" for name, value in others) else 0
