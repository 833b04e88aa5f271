"""Slurm: NeMo-Run writes the batch script of a stage, and this module checks, submits, watches and requeues it.

NeMo-Run's `Experiment` is not used, for three reasons. `Experiment` reports a preempted training as finished if the
training ended with status 0. On a cluster without `sacct`, `Experiment` reports every job as failed. `Experiment`
retries jobs even if they make no progress.
"""

# Do not postpone annotations in this module, and write Optional[...]: NeMo-Run reads them to parse the executor's
# fields.

import dataclasses
import functools
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
from nemo_run.core.execution.slurm import SlurmBatchRequest

from nemo_upcycle.errors import UpcycleError, did_you_mean, failures
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.base import MISSING, Cluster, UnreachableError, hub_variables, wrong_site
from nemo_upcycle.pipeline.executors.ft import SAVE_S, SILENCE_S, ft_command
from nemo_upcycle.pipeline.executors.jobs import Job, JobState, Phase, SaveLimit
from nemo_upcycle.pipeline.executors.site import SiteSettings
from nemo_upcycle.pipeline.executors.slurm_answers import (
    NO_ANSWER,
    OF_CONTROLLER,
    ORPHANED,
    WAITING_STATES,
    ask,
    ending,
    environment,
    job_id,
    last_line,
    refusal_hint,
    waiting,
)
from nemo_upcycle.pipeline.executors.slurm_script import (
    PROLOGUE,
    SUBMIT,
    escaped,
    in_vain,
    missing_mounts,
    require_plain,
    setup_lines,
)
from nemo_upcycle.pipeline.executors.slurm_values import wrong_values
from nemo_upcycle.utils.conf import template
from nemo_upcycle.utils.files import resolved


#: File systems that only one machine sees, unless the machine serves them to others.
_OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay")
#: Address where the `ft_launcher`s of a job meet, expanded by the batch script's shell.
_ENDPOINT = '"$head_node_ip:$((15000 + SLURM_JOB_ID % 10000))"'
_JOB_ID = '"$SLURM_JOB_ID"'
#: Slurm's default seconds between SIGTERM and SIGKILL at the end of a job's time.
_KILL_WAIT_S = 30


@dataclass(kw_only=True)
class StagedSlurmExecutor(SiteSettings, run.SlurmExecutor):
    """NeMo-Run's `SlurmExecutor` with settings for each stage, as a file of conf/executors describes it.

    A training's nodes and ranks are set in its recipe, not in `stages`.

    Attributes:
        hang_detection: whether trainings run under NVIDIA's `ft_launcher`, one per node, which restarts hung ranks.
        silence_s: largest number of seconds between two signs of life of a rank. A save before an early end gives no
            sign.
        counts_gpus: whether Slurm hands out GPUs; False if Slurm does not know the GPUs (no GRES), so that jobs ask
            for no GPUs.
        shared_dir: whether nodes see `dir`, `dense` and `data` although their file system looks like that of a single
            machine.
        python: interpreter of the stages; if None, the container's `python`, or without a container this process's
            interpreter.
        packager: packager of code for the nodes. The default sends nothing, because the nodes have the package.
    """

    account: str = MISSING
    env_vars: dict[str, Optional[str]] = field(default_factory=dict)  # noqa: UP045 - NeMo-Run cannot parse `str | None`
    packager: run.Packager = field(default_factory=run.Packager)
    hang_detection: bool = False
    silence_s: float = SILENCE_S
    counts_gpus: bool = True
    shared_dir: bool = False
    python: Optional[str] = None  # noqa: UP045


#: Meaning of each field that is "???" in a site's file until the site sets the field.
REQUIRED = {
    "account": "the account that jobs are charged to",
    "partition": "a partition of GPU nodes; `sinfo` lists them",
    "container_image": "an image with NeMo, or null without containers",
}


def signal_s(signal: Optional[str]) -> int:  # noqa: UP045 - as the executor's fields
    """Return the seconds between the signal that a job asks for and the end of its time; 0 without a signal.

    Example:
        >>> signal_s("B:TERM@600"), signal_s("TERM"), signal_s(None)
        (600, 60, 0)
    """
    return int(signal.partition("@")[2] or 60) if signal else 0


class SlurmScheduler(Cluster):
    """Scheduler that submits stages as batch jobs, which wait for each other.

    Example:
        >>> job = Job("import", Path("/shared/run"), ("python", "-m", "nemo_upcycle.pipeline"))
        >>> "#SBATCH --account=me" in SlurmScheduler(StagedSlurmExecutor(account="me")).render(job)["import.sh"]
        True
    """

    name, label, settings_class = "slurm", "Slurm", StagedSlurmExecutor
    holds_back = can_detach = True
    performance_part = performance.SLURM
    time_fix = "raise it, or set run.executor.stages.{stage}.signal=TERM@600 and at least an hour"

    @classmethod
    def takes(cls, executor: Any) -> bool:
        """See `Cluster.takes`. This scheduler also takes NeMo-Run's own Slurm executor."""
        return isinstance(executor, run.SlurmExecutor)

    @functools.cached_property
    def identity(self) -> str:
        """See `Cluster.identity`: job ids belong to one controller, which must answer if Slurm is installed."""
        if shutil.which("scontrol") is None:
            return self.label
        asked = ask("scontrol", "show", "config")
        found = re.search(r"^ClusterName\s*=\s*(\S+)", asked.stdout, re.MULTILINE)
        if not found:
            raise UnreachableError(f"Slurm does not say which cluster this is: {last_line(asked.stderr)}")
        return f"{self.label}, cluster {found[1]}"

    def python_of(self, stage: str) -> str:
        """Return a stage's interpreter: the container's, or this process's, which nodes have at the same path."""
        mine = self.settings_for(stage)
        return getattr(mine, "python", None) or ("python" if mine.container_image else sys.executable)

    def wrong_for_all(self) -> list[UpcycleError]:
        """See `Cluster.wrong_for_all`."""
        if isinstance(self.executor, StagedSlurmExecutor):
            return wrong_site(self.executor, f"copy {template('executors')} and fill it in", REQUIRED)
        return []

    def wrong_for(self, job: Job) -> list[UpcycleError]:
        """See `Cluster.wrong_for`."""
        mine = self.settings_for(job.name)
        paths = (job.run_dir, *job.reads, Path(self.python_of(job.name)))
        in_container = bool(mine.container_image)
        found = failures(partial(require_plain, path, in_container=in_container) for path in paths)
        return found + wrong_values(mine, job)

    def check(self, jobs: Sequence[Job]) -> None:
        """See `Cluster.check`: try every job with `sbatch --test-only`, and check that nodes see the job's files."""
        self.check_settings(jobs)
        if shutil.which("sbatch") is None:
            fix = "start the command on the cluster's login node, or write the scripts with --render DIR"
            raise UpcycleError("`sbatch`", kind="missing", got="is not on the PATH", fix=fix)
        for job in jobs:
            tried = ask("sbatch", "--test-only", input=self.render(job)[f"{job.name}.sh"], env=environment())
            if tried.returncode:
                raise self._refused(job, tried.stderr)
            for path in (job.run_dir, *job.reads):
                self._check_seen(path, job)

    def render(self, job: Job) -> dict[str, str]:
        """Render the batch script of a job."""
        mine = self.sized(job)
        request = SlurmBatchRequest(
            launch_cmd=["sbatch", "--requeue", "--parsable"],
            jobs=[job.name],
            command_groups=[[self._command(job)]],
            executor=mine,
            max_retries=0,
            extra_env={},
        )
        return {f"{job.name}.sh": request.materialize().replace("set -evx", PROLOGUE, 1)}

    def sized(self, job: Job) -> run.SlurmExecutor:
        """Return the executor of a stage, with the nodes and ranks of the stage's job."""
        mine = self.settings_for(job.name)
        # The script exports these variables, because NeMo-Run would write `env_vars` without quotes and with names in
        # capitals.
        fast = self.performance(job)
        # Without a container, a job starts in the folder where sbatch was typed, which may contain another clone of
        # the package. PYTHONSAFEPATH (from Python 3.11 on) keeps Python from importing that clone.
        usual = hub_variables(job, mine.env_vars) if mine.container_image else {"PYTHONSAFEPATH": "1"}
        variables = usual | performance.variables(fast)
        variables = {name: value for name, value in (variables | mine.env_vars).items() if value is not None}
        exports = [f'export {name}="{escaped(str(value))}"' for name, value in variables.items()]
        lines = [*setup_lines(job, signal_s(mine.signal)), *exports, *([mine.setup_lines] if mine.setup_lines else [])]
        detects_hangs = self._detects_hangs(job)
        tasks = job.ranks_per_node if detects_hangs else 1  # ranks per Slurm task
        # Without this setting, Slurm keeps jobs in the queue after a predecessor has failed.
        parameters = {"kill_on_invalid_dep": "yes"} | (mine.additional_parameters or {})
        cpus_per_task = mine.cpus_per_task and mine.cpus_per_task * tasks
        # srun of Slurm 22.05 to 24.05 does not inherit the number of cores, and srun of 24.11 does not read
        # SRUN_CPUS_PER_TASK.
        own_cpus = [f"--cpus-per-task={cpus_per_task}"] if cpus_per_task else []
        return dataclasses.replace(
            mine,
            container_mounts=[*mine.container_mounts, *missing_mounts(job, mine.container_mounts)],
            nodes=job.nodes,
            ntasks_per_node=1 if detects_hangs else job.ranks_per_node,
            cpus_per_task=cpus_per_task,
            gpus_per_task=mine.gpus_per_task and mine.gpus_per_task * tasks,
            env_vars={},
            # In a container, an image's own variables win over all variables that are not named here.
            container_env=list(dict.fromkeys([*(mine.container_env or []), *variables])),
            job_dir=str(job.folder),
            srun_args=[*own_cpus, *performance.srun_options(fast), *(mine.srun_args or [])],
            exclusive=mine.exclusive or None,  # NeMo-Run would write --exclusive=False, which Slurm refuses
            segment=performance.segment(fast, job.nodes) or mine.segment,
            job_details=dataclasses.replace(mine.job_details),  # rendering writes the job's name and folder into it
            tunnel=run.LocalTunnel(job_dir=str(job.folder.parent)),
            job_name_prefix=mine.job_name_prefix or f"{job.run_dir.name}.",
            additional_parameters=parameters,
            setup_lines="\n".join(lines),
        )

    def has_container(self, settings: Any) -> bool:
        """See `Cluster.has_container`."""
        return bool(settings.container_image)

    def sets_itself(self, settings: Any, name: str) -> bool:
        """See `Cluster.sets_itself`. An srun option, or its opposite, counts as well."""
        named = {performance.option_name(word) for word in settings.srun_args or []}
        given = {"--segment"} if settings.segment else set()
        return performance.option_name(name) in named | given or super().sets_itself(settings, name)

    def _detects_hangs(self, job: Job) -> bool:
        return job.is_training and getattr(self.settings_for(job.name), "hang_detection", False)

    def _command(self, job: Job) -> str:
        """Write the command that srun starts: one process per rank, or one `ft_launcher` per node."""
        command = (self.python_of(job.name), *job.command[1:])
        if not self._detects_hangs(job):
            return shlex.join([*performance.bound(self.performance(job)), *command])
        mine = self.settings_for(job.name)
        command = ft_command(
            command,
            job.nodes,
            job.ranks_per_node,
            endpoint=_ENDPOINT,
            job=_JOB_ID,
            silence_s=mine.silence_s,
            save_s=max(SAVE_S, signal_s(mine.signal)),
        )
        expanded = (_ENDPOINT, _JOB_ID)
        return " ".join(word if any(text in word for text in expanded) else shlex.quote(word) for word in command)

    def render_chain(self, jobs: Sequence[Job]) -> dict[str, str]:
        """See `Cluster.render_chain`: a script that submits the other scripts."""
        folders = " ".join(shlex.quote(str(job.folder)) for job in jobs)
        lines = [SUBMIT.format(folders=folders, kept="|".join(OF_CONTROLLER)).strip()]
        names = {job.name: f"job_{job.name}" for job in jobs}
        for job in jobs:
            after = "".join(f":${{{names[name]}}}" for name in job.after if name in names)
            dependency = f" --dependency=afterok{after}" if after else ""
            lines.append(f"{names[job.name]}=$(submit{dependency} {job.name}.sh)")
        return {"submit.sh": "\n".join([*lines, ""])}

    def submit(self, job: Job, after: Sequence[str]) -> str:
        """Write the batch script to the run's folder and submit it."""
        (path,) = self.write(job, job.folder)
        in_vain(job).unlink(missing_ok=True)  # an earlier job left this file
        dependency = [f"--dependency=afterok:{':'.join(after)}"] if after else []
        done = ask("sbatch", "--requeue", "--parsable", *dependency, str(path), env=environment())
        identity = job_id(done.stdout)
        if done.returncode or not identity:
            raise self._refused(job, done.stderr or done.stdout)
        return identity

    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        """Ask `squeue` for the states of jobs, and the controller or the accounting about jobs that have ended."""
        asked = ask("squeue", "--noheader", f"--jobs={','.join(ids)}", "--format=%i|%T|%r|%P|%N")
        if asked.returncode and "Invalid job id" not in asked.stderr:  # the controller gave no answer
            return {identity: JobState(Phase.WAITING, last_line(asked.stderr)) for identity in ids}
        found = {}
        for line in asked.stdout.splitlines():
            identity, state, reason, partition, nodes = line.split("|")
            running = JobState(Phase.RUNNING, f"on {nodes}")
            found[identity] = waiting(identity, reason, partition) if state in WAITING_STATES else running
        for identity in set(ids) - found.keys():
            how = ending(identity)
            found[identity] = JobState(Phase.ENDED, how, is_orphaned=ORPHANED in how)
        return {identity: found[identity] for identity in ids}

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs with `scancel`."""
        ask("scancel", *ids)

    def save_limits(self, job: Job) -> Sequence[SaveLimit]:
        """See `Cluster.save_limits`: the end of the job's time, and the time after which a rank counts as hung."""
        mine, setting = self.settings_for(job.name), f"run.executor.stages.{job.name}"
        what = (
            f"signal {mine.signal}" if mine.signal else f"KillWait, {_KILL_WAIT_S} s by default, and no signal before"
        )
        lost, fix = "the work since the checkpoint before is lost", f"{setting}.signal=TERM@{{seconds}}"
        limits = [SaveLimit(signal_s(mine.signal) or _KILL_WAIT_S, what, lost, fix)]
        if self._detects_hangs(job):
            what = f"silence_s {mine.silence_s:g} of hang detection"
            lost, fix = "the ranks are taken for hung and started again", f"{setting}.silence_s={{seconds}}"
            limits.append(SaveLimit(mine.silence_s, what, lost, fix))
        return limits

    def goes_on(self, job: Job) -> bool:
        """See `Cluster.goes_on`: a resumable stage is requeued if it is told to stop before the end of its time."""
        return job.is_resumable and bool(self.settings_for(job.name).signal)

    def cancel_command(self, identity: str) -> str:
        """See `Cluster.cancel_command`."""
        return f"scancel {identity}"

    def logs(self, job: Job, identity: str) -> Sequence[Path]:
        """Return the ranks' logs of all starts, and the batch script's log, where Slurm says why a job ended."""
        return [*sorted(job.folder.glob(f"log*_{identity}_*.out")), *job.folder.glob(f"sbatch_*_{identity}.out")]

    def resources(self, job: Job) -> dict[str, str]:
        """List the resources that a job asks for."""
        mine = self.settings_for(job.name)
        names = ("partition", "account", "qos", "time", "mem", "cpus_per_task", "gpus_per_node", "container_image")
        asked = {name: getattr(mine, name) for name in (*names, "signal")}
        return {name: str(value) for name, value in asked.items() if value is not None}

    def _refused(self, job: Job, text: str) -> UpcycleError:
        """Return the error for a job that Slurm refuses, with the wrong setting if Slurm names it."""
        partition, hint = self.settings_for(job.name).partition, refusal_hint(text)
        if partition and "invalid partition" in text.lower():
            partitions = sorted(set(ask("sinfo", "--noheader", "--format=%R").stdout.split()))
            hint = f"{did_you_mean(partition, partitions)} Partitions: {', '.join(partitions)}."
        kind = UnreachableError if any(words in text for words in NO_ANSWER) else UpcycleError
        return kind(f"Slurm refuses stage '{job.name}': {last_line(text).rstrip('.')}.{hint}")

    def _check_seen(self, path: Path, job: Job) -> None:
        """Check that the nodes see a path that a stage reads or writes, judging by the path's file system."""
        kind = filesystem_type(path)
        if kind not in _OF_ONE_MACHINE or getattr(self.executor, "shared_dir", False):
            return
        wanted = self.settings_for(job.name).partition
        partition = [f"--partition={wanted}"] if wanted else []
        names = set(ask("sinfo", "--noheader", "--Node", "--format=%n", *partition).stdout.split())
        here = socket.gethostname().partition(".")[0]
        if others := sorted(name for name in names if name.partition(".")[0] != here):
            raise UpcycleError(
                f"Folder {path}" if path == job.run_dir else str(path),
                kind="state",
                got=f"is on a file system of type {kind}, which {', '.join(others[:3])} do not see",
                fix="put the folder on shared storage. If the nodes do see it, set run.executor.shared_dir=True",
            )


def filesystem_type(path: Path) -> str | None:
    """Return the type of a path's file system, such as `ext4` or `lustre`; None if unknown. The path may be missing.

    Example:
        >>> filesystem_type(Path("/proc/self/new"))
        'proc'
    """
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return None
    target = resolved(path)
    found = [(len(point), kind) for _, point, kind, *_ in map(str.split, mounts) if target.is_relative_to(point)]
    return max(found)[1] if found else None
