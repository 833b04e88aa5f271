"""Slurm: NeMo-Run writes the batch script of a stage; here it is checked, submitted, watched and requeued.

NeMo-Run's `Experiment` is not used: it takes a training that was preempted and ended with status 0 for finished, a
cluster without `sacct` for a failure, and its retries do not ask whether a job got any further.
"""

# No postponed annotations: NeMo-Run parses the executor's fields by them.

import dataclasses
import functools
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nemo_run as run
from nemo_run.core.execution.slurm import SlurmBatchRequest

from nemo_upcycle.errors import UpcycleError, did_you_mean
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.base import (
    Cluster,
    Job,
    JobState,
    Phase,
    SaveLimit,
    UnreachableError,
    hub_variables,
    require_settings,
)
from nemo_upcycle.pipeline.executors.ft import SAVE_S, ft_command
from nemo_upcycle.pipeline.executors.slurm_answers import (
    NO_ANSWER,
    OF_CONTROLLER,
    ORPHANED,
    cluster_name,
    ending,
    environment,
    job_id,
    last_line,
    refusal_hint,
    waiting,
)
from nemo_upcycle.pipeline.executors.slurm_script import PROLOGUE, SUBMIT, in_vain, setup_lines
from nemo_upcycle.pipeline.executors.slurm_settings import (
    REQUIRED,
    StagedSlurmExecutor,
    escaped,
    missing_mounts,
    require_plain,
    require_supported,
    signal_s,
)
from nemo_upcycle.utils.conf import template
from nemo_upcycle.utils.files import resolved


#: File systems that only one machine sees, unless it serves them to others.
_OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay")
#: Where the `ft_launcher`s of a job meet; for the batch script's shell.
_ENDPOINT = '"$head_node_ip:$((15000 + SLURM_JOB_ID % 10000))"'
_JOB_ID = '"$SLURM_JOB_ID"'
#: Seconds between SIGTERM and SIGKILL at the end of a job's time, where slurm.conf does not say otherwise.
_KILL_WAIT_S = 30
_WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def _sbatch(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    command = ["sbatch", *words]
    return subprocess.run(command, input=text, env=environment(), capture_output=True, text=True, check=False)


def _ended(identity: str) -> JobState:
    how = ending(identity)
    return JobState(Phase.ENDED, how, is_orphaned=ORPHANED in how)


class SlurmScheduler(Cluster):
    """Submit stages as batch jobs that wait for each other.

    Example:
        >>> job = Job("import", Path("/shared/run"), ("python", "-m", "nemo_upcycle.pipeline"))
        >>> "#SBATCH --account=me" in SlurmScheduler(StagedSlurmExecutor(account="me")).render(job)["import.sh"]
        True
    """

    name, label, settings_class = "slurm", "Slurm", StagedSlurmExecutor
    holds_back = can_detach = True
    performance_part = performance.SLURM

    @classmethod
    def takes(cls, executor: Any) -> bool:
        """See `Cluster.takes`: also one of NeMo-Run's own."""
        return isinstance(executor, run.SlurmExecutor)

    @functools.cached_property
    def identity(self) -> str:
        """See `Cluster.identity`: job ids are those of one controller."""
        name = cluster_name()
        return f"{self.label}, cluster {name}" if name else self.label

    def python_of(self, stage: str) -> str:
        """See `Cluster.python_of`: the container's, or this one, which the nodes find under the same path."""
        mine = self.settings_for(stage)
        return getattr(mine, "python", None) or ("python" if mine.container_image else sys.executable)

    def check_settings(self, jobs: Sequence[Job]) -> None:
        """See `Cluster.check_settings`: what the site must set."""
        if isinstance(self.executor, StagedSlurmExecutor):
            require_settings(self.executor, f"copy {template('executors')} and fill it in", REQUIRED)
        for job in jobs:
            for path in (job.run_dir, *job.reads, Path(self.python_of(job.name))):
                require_plain(path, in_container=bool(self.settings_for(job.name).container_image))

    def check(self, jobs: Sequence[Job]) -> None:
        """See `Cluster.check`: with `sbatch --test-only` every job, and that the nodes see what it reads."""
        self.check_settings(jobs)
        if not isinstance(self.executor.tunnel, run.LocalTunnel):
            raise UpcycleError(
                "run.executor.tunnel",
                got=type(self.executor.tunnel).__name__,
                expected="LocalTunnel: the run's folder is written and read here",
                fix="start the command on the cluster's login node",
            )
        if shutil.which("sbatch") is None:
            raise UpcycleError(
                "sbatch",
                got="not on the PATH",
                expected="Slurm's commands",
                fix="start the command on the cluster's login node, or write the scripts with --render DIR",
            )
        for job in jobs:
            script = self.render(job)[f"{job.name}.sh"]
            tried = _sbatch("--test-only", text=script)
            if tried.returncode:
                raise self._refused(job, tried.stderr)
            for path in (job.run_dir, *job.reads):
                self._check_seen(path, job)

    def render(self, job: Job) -> dict[str, str]:
        """Return the batch script."""
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
        """Return the executor of a stage, with the nodes and ranks of its job."""
        mine = self.settings_for(job.name)
        require_supported(mine, job)
        # Not as `env_vars`: NeMo-Run writes these without quotes, and their names in capitals.
        fast = self.performance(job)
        variables = (hub_variables(job, mine.env_vars) if mine.container_image else {}) | performance.variables(fast)
        variables = {name: value for name, value in (variables | mine.env_vars).items() if value is not None}
        exports = [f'export {name}="{escaped(str(value))}"' for name, value in variables.items()]
        lines = [*setup_lines(job), *exports, *([mine.setup_lines] if mine.setup_lines else [])]
        detects_hangs = self._detects_hangs(job)
        tasks = job.ranks_per_node if detects_hangs else 1  # of a rank each, in one of Slurm's
        # Otherwise Slurm keeps jobs queued whose predecessor failed.
        parameters = {"kill_on_invalid_dep": "yes"} | (mine.additional_parameters or {})
        return dataclasses.replace(
            mine,
            container_mounts=[*mine.container_mounts, *missing_mounts(job, mine.container_mounts)],
            nodes=job.nodes,
            ntasks_per_node=1 if detects_hangs else job.ranks_per_node,
            cpus_per_task=mine.cpus_per_task and mine.cpus_per_task * tasks,
            gpus_per_task=mine.gpus_per_task and mine.gpus_per_task * tasks,
            env_vars={},
            # In a container an image's own variables win over all that are not named.
            container_env=list(dict.fromkeys([*(mine.container_env or []), *variables])),
            job_dir=str(job.folder),
            srun_args=[*performance.srun_options(fast), *(mine.srun_args or [])],
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
        """See `Cluster.sets_itself`: also by an option of srun, or the opposite one."""
        named = {performance.option_name(word) for word in settings.srun_args or []}
        given = {"--segment"} if settings.segment else set()
        return performance.option_name(name) in named | given or super().sets_itself(settings, name)

    def _detects_hangs(self, job: Job) -> bool:
        return job.is_training and getattr(self.settings_for(job.name), "hang_detection", False)

    def _command(self, job: Job) -> str:
        """Return what srun starts: one process a rank, or one `ft_launcher` a node."""
        command = (self.python_of(job.name), *job.command[1:])
        if not self._detects_hangs(job):
            return shlex.join([*performance.bound(self.performance(job)), *command])
        mine = self.settings_for(job.name)
        command = ft_command(
            command,
            job.nodes,
            job.ranks_per_node,
            python=command[0],
            endpoint=_ENDPOINT,
            job=_JOB_ID,
            silence_s=mine.silence_s,
            save_s=max(SAVE_S, signal_s(mine.signal)),
        )
        expanded = (_ENDPOINT, _JOB_ID)
        return " ".join(word if any(text in word for text in expanded) else shlex.quote(word) for word in command)

    def render_chain(self, jobs: Sequence[Job]) -> dict[str, str]:
        """See `Cluster.render_chain`: a script that submits the others."""
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
        in_vain(job).unlink(missing_ok=True)  # of an earlier job, whose cause may be gone
        dependency = [f"--dependency=afterok:{':'.join(after)}"] if after else []
        done = _sbatch("--requeue", "--parsable", *dependency, str(path))
        identity = job_id(done.stdout)
        if done.returncode or not identity:
            raise self._refused(job, done.stderr or done.stdout)
        return identity

    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        """Return what `squeue` says, and for ended jobs the controller's or the accounting's last word."""
        asked = subprocess.run(
            ["squeue", "--noheader", f"--jobs={','.join(ids)}", "--format=%i|%T|%r|%P|%N"],
            capture_output=True,
            text=True,
            check=False,
        )
        if asked.returncode and "Invalid job id" not in asked.stderr:  # the controller does not answer: nothing ended
            return {identity: JobState(Phase.WAITING, last_line(asked.stderr)) for identity in ids}
        found = {}
        for line in asked.stdout.splitlines():
            identity, state, reason, partition, nodes = line.split("|")
            is_waiting = state in _WAITING
            found[identity] = (
                waiting(identity, reason, partition) if is_waiting else JobState(Phase.RUNNING, f"on {nodes}")
            )
        return {identity: found.get(identity) or _ended(identity) for identity in ids}

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs with `scancel`."""
        subprocess.run(["scancel", *ids], capture_output=True, check=False)

    def save_limits(self, job: Job) -> Sequence[SaveLimit]:
        """See `Cluster.save_limits`: before the end of its time, and before hang detection takes it for hung."""
        mine, setting = self.settings_for(job.name), f"run.executor.stages.{job.name}"
        what = (
            f"signal {mine.signal}" if mine.signal else f"KillWait, {_KILL_WAIT_S} s by default, and no signal before"
        )
        ends = SaveLimit(
            signal_s(mine.signal) or _KILL_WAIT_S,
            what,
            "the work since the checkpoint before is lost",
            f"{setting}.signal=TERM@{{seconds}}",
        )
        if not self._detects_hangs(job):
            return [ends]
        silence = SaveLimit(
            mine.silence_s,
            f"silence_s {mine.silence_s:g} of hang detection",
            "the ranks are taken for hung and started again",
            f"{setting}.silence_s={{seconds}}",
        )
        return [ends, silence]

    def cancel_command(self, identity: str) -> str:
        """See `Cluster.cancel_command`."""
        return f"scancel {identity}"

    def logs(self, job: Job, identity: str) -> Sequence[Path]:
        """Return the logs of all starts of the ranks, and that of the batch script, where Slurm says why it ended."""
        return [*sorted(job.folder.glob(f"log*_{identity}_*.out")), *job.folder.glob(f"sbatch_*_{identity}.out")]

    def resources(self, job: Job) -> dict[str, str]:
        """Return what a job asks for."""
        mine = self.settings_for(job.name)
        names = ("partition", "account", "qos", "time", "mem", "cpus_per_task", "gpus_per_node", "container_image")
        asked = {name: getattr(mine, name) for name in (*names, "signal")}
        return {name: str(value) for name, value in asked.items() if value is not None}

    def _refused(self, job: Job, text: str) -> UpcycleError:
        """Return the error of a job that Slurm does not take, with what is wrong in the settings if Slurm says it."""
        partition, hint = self.settings_for(job.name).partition, refusal_hint(text)
        if partition and "invalid partition" in text.lower():
            listed = subprocess.run(
                ["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=False
            )
            partitions = sorted(set(listed.stdout.split()))
            hint = f"{did_you_mean(partition, partitions)} Partitions: {', '.join(partitions)}."
        kind = UnreachableError if any(words in text for words in NO_ANSWER) else UpcycleError
        return kind(f"Slurm does not take stage '{job.name}': {last_line(text).rstrip('.')}.{hint}")

    def _check_seen(self, path: Path, job: Job) -> None:
        """Check that the nodes see what a stage reads or writes, as far as its file system tells."""
        kind = filesystem_type(path)
        if kind not in _OF_ONE_MACHINE or getattr(self.executor, "shared_dir", False):
            return
        wanted = self.settings_for(job.name).partition
        command = ["sinfo", "--noheader", "--Node", "--format=%n"] + ([f"--partition={wanted}"] if wanted else [])
        names = set(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split())
        here = socket.gethostname().partition(".")[0]
        if others := sorted(name for name in names if name.partition(".")[0] != here):
            raise UpcycleError(
                f"dir {path}" if path == job.run_dir else str(path),
                got=f"a file system of type {kind}, which this machine alone sees",
                expected=f"one that the nodes see as well ({', '.join(others[:3])}, ...)",
                fix="put it on shared storage; or, if it is served to the nodes, run.executor.shared_dir=True",
            )


def filesystem_type(path: Path) -> str | None:
    """Return the type of the file system that a path lies on, or would, such as `ext4` or `lustre`; None if unknown.

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
