"""The interface of this package's executors: check, render, submit, watch and cancel the jobs of a chain's stages."""

from __future__ import annotations

import copy
import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_upcycle.errors import UpcycleError, failures
from nemo_upcycle.pipeline.executors.jobs import Job, JobState, SaveLimit
from nemo_upcycle.pipeline.executors.performance import performance_settings
from nemo_upcycle.planning.hardware import gpu_names
from nemo_upcycle.utils.masking import masked, masked_text, write_private
from nemo_upcycle.utils.validation import check_number


if TYPE_CHECKING:
    from typing_extensions import Self


#: GPU of an executor that names no GPU. The recipes are written for this GPU.
USUAL_CARD = "h100"
#: Text at the end of an error's subject if a key does not exist.
_UNKNOWN_KEY = ": key"
#: Settings that must be the same for all stages of a run.
_OF_ALL_STAGES = ("price_per_gpu_hour", "write_gib_s", "gpu_hours_between_failures", "restart_s")
#: Value of a field that a site has to fill in, as in OmegaConf.
MISSING = "???"


class UnreachableError(UpcycleError):
    """The scheduler did not answer a request; another try may succeed."""


def is_local(executor: Any) -> bool:
    """Return whether the stages run on this machine."""
    if executor is None:
        return True
    from nemo_run import LocalExecutor  # this import takes seconds, so a stage avoids it

    return isinstance(executor, LocalExecutor)


class Cluster(ABC):
    """A scheduler that runs jobs. Each executor is one subclass in one file, with a line in `site_file.CLUSTERS`.

    Args:
        executor: the user's settings, common to all stages.
    """

    #: Name of the scheduler in messages.
    label: str
    #: Name of the scheduler after `executor:` in a YAML file, and the dataclass of the file's other keys.
    name: ClassVar[str]
    settings_class: ClassVar[type]
    #: Seconds between two queries to the scheduler.
    poll_s: float = 15.0
    #: Part of the performance table that applies only to this scheduler; empty if there is no such part.
    performance_part: str = ""
    #: Whether the scheduler holds a job back until the jobs that it depends on have succeeded.
    holds_back: bool = False
    #: Field that limits the time of a job, and the fix if the limit is too short.
    time_setting: str = "time"
    time_fix: str = "raise it"
    #: Whether the jobs of a chain run without the launcher, each after the jobs that it needs.
    can_detach: bool = False

    @classmethod
    def takes(cls, executor: Any) -> bool:
        """Return whether the jobs of an executor go to this scheduler."""
        return isinstance(executor, cls.settings_class)

    def __init__(self, executor: Any) -> None:
        self.executor = executor

    @property
    def identity(self) -> str:
        """Unique identity of the scheduler. Jobs of two schedulers may have the same ids."""
        return self.label

    @abstractmethod
    def wrong_for_all(self) -> list[UpcycleError]:
        """List missing and unusable settings that are common to all stages, without asking the scheduler."""

    @abstractmethod
    def wrong_for(self, job: Job) -> list[UpcycleError]:
        """List settings of a stage that would be ignored or cannot work, without asking the scheduler."""

    def wrong_settings(self, jobs: Sequence[Job]) -> list[UpcycleError]:
        """List settings that are missing, would be ignored, or do not fit these jobs, without asking the scheduler."""
        found = self.wrong_for_all()
        if any(error.subject.endswith(_UNKNOWN_KEY) for error in found):  # then no stage has settings
            return found
        for job in jobs:
            of_job = self.wrong_for(job) or failures([partial(self.render, job)])
            found += [error for error in of_job if MISSING not in str(error)]  # already in `found`
        return found

    def check_settings(self, jobs: Sequence[Job]) -> None:
        """Check the settings; see `wrong_settings`.

        Raises:
            UpcycleError: some settings are wrong; the text names each setting to change.
        """
        if wrong := self.wrong_settings(jobs):
            raise UpcycleError.together(wrong)

    @abstractmethod
    def check(self, jobs: Sequence[Job]) -> None:
        """Check the settings, and ask the scheduler whether it would accept these jobs. Start and write nothing.

        Raises:
            UpcycleError: the scheduler would refuse a job; the text has the reason and the setting to change.
        """

    @abstractmethod
    def render(self, job: Job) -> dict[str, str]:
        """Return the text of each file of a job, by the file's name, without asking the scheduler."""

    def masked(self) -> Self:
        """Return a copy of this scheduler that masks secrets in the files it renders, for display."""
        shown = copy.copy(self)
        shown.executor = copy.copy(self.executor)
        for name, value in _masked_settings(vars(self.executor)).items():
            setattr(shown.executor, name, value)
        if table := getattr(self.executor, "stages", None):
            shown.executor.stages = {stage: settings | _masked_settings(settings) for stage, settings in table.items()}
        return shown

    def write(self, job: Job, folder: Path) -> list[Path]:
        """Write the files of a job and return their paths. Files with a secret are readable by their owner only."""
        folder.mkdir(parents=True, exist_ok=True)
        shown = self.masked().render(job)
        files = {folder / name: text for name, text in self.render(job).items()}
        for path, text in files.items():
            write_private(path, text, private=text != shown[path.name])
        return list(files)

    def render_as(self, job: Job, identity: str) -> dict[str, str]:
        """Render a job with the present settings, under the file names of the submitted job `identity`."""
        return self.render(job)

    def render_chain(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Return files, by name, with which a user can submit the rendered jobs; none by default."""
        return {}

    @abstractmethod
    def submit(self, job: Job, after: Sequence[str]) -> str:
        """Submit a job and return its id.

        Args:
            job: job to submit.
            after: ids of the jobs that must succeed first, if the scheduler holds jobs back; otherwise empty.
        """

    @abstractmethod
    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        """Ask the scheduler for the states of jobs. A job counts as ended if the scheduler does not know it."""

    @abstractmethod
    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel waiting and running jobs."""

    @abstractmethod
    def cancel_command(self, identity: str) -> str:
        """Return the command that cancels a job, as a person types it."""

    @abstractmethod
    def logs(self, job: Job, identity: str) -> Sequence[Path]:
        """Return the paths of a job's log files. The files may be missing, or may be on another machine."""

    @abstractmethod
    def resources(self, job: Job) -> dict[str, str]:
        """List the resources of a job, by name, for people: partition or queue, time, memory, GPUs, image."""

    def performance(self, job: Job) -> dict[str, str]:
        """Return NVIDIA's performance settings for a job, without the settings that the site sets itself.

        Raises:
            UpcycleError: the site changes a setting that does not exist.
        """
        mine = self.settings_for(job.name)
        found = performance_settings(
            job,
            getattr(mine, "card", USUAL_CARD),
            scheduler=self.performance_part,
            container=self.has_container(mine),
            changed=getattr(mine, "performance", {}),
        )
        accelerator = job.profile.accelerator if job.profile else "auto"
        if accelerator == "cpu" or (accelerator == "auto" and not asks_for_gpus(self.resources(job))):
            return {}
        return {name: value for name, value in found.items() if not self.sets_itself(mine, name)}

    def has_container(self, settings: Any) -> bool:
        """Return whether a stage with these settings runs in a container."""
        return True

    def sets_itself(self, settings: Any, name: str) -> bool:
        """Return whether the site's settings of a stage already set the performance setting of this name."""
        return name in getattr(settings, "env_vars", {})

    def save_limits(self, job: Job) -> Sequence[SaveLimit]:
        """Return the time limits within which a training must save; none if the scheduler sets no limit."""
        return ()

    def goes_on(self, job: Job) -> bool:
        """Return whether a stage continues in another job when the time of its job is over."""
        return False

    def settings_for(self, stage: str) -> Any:
        """Return the executor with the fields that its table of stages sets for one stage."""
        return dataclasses.replace(self.executor, **getattr(self.executor, "stages", {}).get(stage, {}))


def _masked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that may hold secrets, with the secrets masked."""
    masks: dict[str, Callable[[Any], Any]] = {"env_vars": masked, "setup_lines": masked_text}
    return {name: mask(settings[name]) for name, mask in masks.items() if settings.get(name)}


def asks_for_gpus(resources: Mapping[str, str]) -> bool:
    """Return whether the resources that a job asks for include GPUs."""
    return any("gpu" in name.lower() and value not in ("", "0", "none") for name, value in resources.items())


def hub_variables(job: Job, given: Mapping[str, Any]) -> dict[str, str]:
    """Keep a containerised stage's Hugging Face cache in the run's folder, where later stages find it.

    Args:
        job: job of the stage.
        given: variables that the site sets; if they include HF_HOME or HF_HUB_CACHE, that variable sets the place of
            the cache.
    """
    return {} if {"HF_HOME", "HF_HUB_CACHE"} & set(given) else {"HF_HUB_CACHE": str(job.run_dir / "hub")}


def wrong_site(executor: Any, where: str, why: Mapping[str, str]) -> list[UpcycleError]:
    """List required fields that are missing, fields with an invalid value, and fields that do not exist.

    Args:
        executor: executor with the fields of its class, and `stages`.
        where: file that the user may change, for the message.
        why: meaning of each required field.
    """
    found = []
    for name, what in why.items():
        if getattr(executor, name) == MISSING:
            fix = f"give run.executor.{name}=..., or {where}"
            found.append(
                UpcycleError(f"run.executor.{name}", kind="missing", got="is missing", expected=what, fix=fix)
            )
    fields = {field.name for field in dataclasses.fields(executor) if field.init} - {"stages"}
    for stage, settings in executor.stages.items():
        for name, value in settings.items():
            setting = f"run.executor.stages.{stage}"
            if name not in fields:
                found.append(UpcycleError.unknown(setting + _UNKNOWN_KEY, name, fields))
            elif name in _OF_ALL_STAGES:
                fix = f"set run.executor.{name} instead"
                got = f"is {value}, but this setting must be the same for all stages"
                found.append(UpcycleError(f"{setting}.{name}", kind="refused", got=got, fix=fix))
    price, hours = executor.price_per_gpu_hour, executor.gpu_hours_between_failures
    return found + failures(
        [
            lambda: require_card(executor.card),
            lambda: check_number("run.executor.write_gib_s", executor.write_gib_s, 0.001),
            lambda: check_number("run.executor.price_per_gpu_hour", 0 if price is None else price, 0),
            lambda: check_number("run.executor.gpu_hours_between_failures", 1 if hours is None else hours, 1),
            lambda: check_number("run.executor.restart_s", executor.restart_s, 0),
        ]
    )


def require_card(name: str) -> None:
    """Check that the planner knows a kind of GPU.

    Raises:
        UpcycleError: the planner does not know this kind.
    """
    if name not in gpu_names():
        raise UpcycleError.unknown("run.executor.card", name, gpu_names())


def require_variables(names: Iterable[str]) -> None:
    """Check that bash can export variables of these names.

    Raises:
        UpcycleError: bash cannot export one of these variables.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            fix = f"rename the variable, for example to {re.sub('^(?=[0-9])|[^A-Za-z0-9_]', '_', name)}"
            expected = "a name of letters, digits and _ that does not begin with a digit"
            raise UpcycleError("run.executor.env_vars", got=f"'{name}'", expected=expected, fix=fix)


def require_gpus(job: Job, per_node: int | None, fix: str = "set it") -> None:
    """Check that a stage that needs GPUs asks for them, and that a training's nodes have one GPU per rank.

    A training needs GPUs if `stage_jobs.needs_gpus` says so. Evaluation needs a GPU if a training of the run needs
    GPUs.

    Args:
        job: job of the stage.
        per_node: GPUs per node that the job asks for; None if the job asks for an unknown number of GPUs.
        fix: fix in the message if the job asks for no GPUs.

    Raises:
        UpcycleError: the job asks for no GPUs, or for too few.
    """
    setting = f"run.executor.stages.{job.name}.gpus_per_node"
    if job.gpus and per_node == 0:
        trains = f"{job.gpus}, one for each rank of the recipe"
        needs = trains if job.is_training else "1 or more, because the stage runs models that need GPUs"
        raise UpcycleError(setting, got=0, expected=needs, fix=fix)
    if per_node and job.is_training and per_node < job.ranks_per_node:
        expected = f"at least {job.ranks_per_node}, the number of ranks per node"
        fix = f"raise it, or set {job.name}.trainer.devices={per_node} and raise {job.name}.trainer.num_nodes"
        raise UpcycleError(setting, got=per_node, expected=expected, fix=fix)
