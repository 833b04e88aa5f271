"""Give the data engine's tasks the account, partition and container of a site's Slurm file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.data.environment import VARIABLE
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import MISSING
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.executors.site_file import read_executor
from nemo_upcycle.pipeline.executors.slurm import REQUIRED, SlurmScheduler, StagedSlurmExecutor
from nemo_upcycle.pipeline.executors.slurm_script import missing_mounts


#: Settings that sbatch takes under the same name. Cores and memory are omitted, because the file gives the cores and
#: memory of the whole data stage (one job), while a task has one core.
_SBATCH = ("account", "qos", "constraint", "exclude", "network")


@dataclass(frozen=True)
class DataTaskOptions:
    """Options with which the data engine submits its tasks.

    Args:
        words: options of the engine's command line.
        variables: environment variables of the tasks.
    """

    words: tuple[str, ...]
    variables: dict[str, str]


def data_task_options(file: str, output: Path, time: str | None = None) -> DataTaskOptions:
    """Read the options for the data engine's tasks from a site's Slurm file.

    Args:
        file: path of the YAML file, as `run.executor` takes it.
        output: folder that the tasks write to.
        time: time limit of a task (D-HH:MM:SS); if None, the limit of the file's data stage.

    Raises:
        UpcycleError: the file describes another scheduler, lacks a value, or has a value that sbatch refuses.

    Example:
        >>> data_task_options("mine.yaml", Path("/shared/data")).words[:4]  # doctest: +SKIP
        ('--slurm', 'cpu', '--time', '24:00:00')
    """
    scheduler = _scheduler_of(file)
    job = Job("data", output, ("python",))
    if wrong := scheduler.wrong_for(job):
        raise UpcycleError.together(wrong)
    mine = scheduler.settings_for(job.name)
    if mine.setup_lines:
        fix = "set stages.data.setup_lines: null if the tasks need none, or run the blend as a stage of a pipeline"
        raise UpcycleError(f"{file}: setup_lines", kind="refused", got="are not run by data tasks", fix=fix)
    variables = {name: str(value) for name, value in mine.env_vars.items() if value is not None}
    python = variables.pop(VARIABLE, None)
    options = {name: value for name in _SBATCH if (value := getattr(mine, name))} | (mine.additional_parameters or {})
    srun = list(mine.srun_args or [])
    if mine.container_image:
        if python is None:
            fix = "run `nemo-upcycle doctor` in the container. It prints the command that makes this environment"
            raise UpcycleError(
                f"{file}: env_vars.{VARIABLE}",
                kind="missing",
                got="is missing: the container needs a Python environment for the data engine",
                fix=fix,
            )
        mounts = [*mine.container_mounts, *missing_mounts(job, mine.container_mounts)]
        # Name our variables, because an image's own variables override all variables that are not named.
        named = dict.fromkeys([*(mine.container_env or []), *variables])
        srun += [f"--container-image={mine.container_image}", f"--container-mounts={','.join(mounts)}"]
        srun += [f"--container-env={','.join(named)}"] if named else []
    words = ["--slurm", mine.partition, "--time", time or mine.time]
    words += [f"--sbatch={name}={value}" for name, value in options.items()]
    words += [f"--srun={word}" for word in srun]
    words += [f"--task-python={python}"] if python else []
    return DataTaskOptions(tuple(words), variables)


def _scheduler_of(file: str) -> SlurmScheduler:
    """Read the Slurm scheduler that a site's file describes.

    Raises:
        UpcycleError: the file does not describe Slurm, or a value that the site must set is missing.
    """
    executor = read_executor(file)
    if not isinstance(executor, StagedSlurmExecutor):
        fix = "name a file with `executor: slurm`, or use --workers"
        raise UpcycleError(f"--slurm {file}", kind="refused", got="is a file for another scheduler", fix=fix)
    missing = [name for name in REQUIRED if getattr(executor, name) in (MISSING, "")]
    missing += [] if executor.partition is not None else ["partition"]
    wrong = [
        UpcycleError(f"{file}: {name}", kind="missing", got="is missing", expected=f"{REQUIRED[name]}", fix="set it")
        for name in missing
    ]
    if wrong:
        raise UpcycleError.together(wrong)
    return SlurmScheduler(executor)
