"""What an executor of this package does: check, render, submit, watch and cancel the jobs of a chain's stages."""

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


#: The card of an executor that names none: the recipes are written for it.
USUAL_CARD = "h100"
#: How the subject of an error about a key that does not exist ends.
_UNKNOWN_KEY = ": key"
#: Settings that the stages of a run have in common.
_OF_ALL_STAGES = ("price_per_gpu_hour", "write_gib_s")
#: What a field holds that a site has to fill in, as in OmegaConf.
MISSING = "???"


class UnreachableError(UpcycleError):
    """The scheduler gave no answer to the request: worth another try."""


def is_local(executor: Any) -> bool:
    """Return whether the stages run on this machine."""
    if executor is None:
        return True
    from nemo_run import LocalExecutor  # seconds, which a stage's own process need not wait

    return isinstance(executor, LocalExecutor)


class Cluster(ABC):
    """A scheduler that runs jobs; one subclass an executor, in one file, and a line in `site_file.CLUSTERS`.

    Args:
        executor: the user's settings, common to all stages.
    """

    #: Its name, for people.
    label: str
    #: What a YAML file calls it with `executor:`, and the dataclass of the other keys.
    name: ClassVar[str]
    settings_class: ClassVar[type]
    #: Seconds between two questions to the scheduler.
    poll_s: float = 15.0
    #: The part of the table of performance settings that is for this scheduler; empty: none.
    performance_part: str = ""
    #: Whether the scheduler holds a job back until those that it depends on have succeeded.
    holds_back: bool = False
    #: The field that limits the time of a job, and what to do if that is too short.
    time_setting: str = "time"
    time_fix: str = "raise it"
    #: Whether its jobs go on, each after those that it needs, without the launcher.
    can_detach: bool = False

    @classmethod
    def takes(cls, executor: Any) -> bool:
        """Return whether the jobs of an executor go to this scheduler."""
        return isinstance(executor, cls.settings_class)

    def __init__(self, executor: Any) -> None:
        self.executor = executor

    @property
    def identity(self) -> str:
        """An identity that no other scheduler has, whose jobs may have the same ids."""
        return self.label

    @abstractmethod
    def wrong_for_all(self) -> list[UpcycleError]:
        """List the settings of all stages that are missing or cannot work; ask no scheduler."""

    @abstractmethod
    def wrong_for(self, job: Job) -> list[UpcycleError]:
        """List the settings of a stage that would be ignored or cannot work; ask no scheduler."""

    def wrong_settings(self, jobs: Sequence[Job]) -> list[UpcycleError]:
        """List the settings that are missing, would be ignored, or do not fit these jobs; ask no scheduler."""
        found = self.wrong_for_all()
        if any(error.subject.endswith(_UNKNOWN_KEY) for error in found):  # no stage has settings then
            return found
        for job in jobs:
            of_job = self.wrong_for(job) or failures([partial(self.render, job)])
            found += [error for error in of_job if MISSING not in str(error)]  # which is in the list already
        return found

    def check_settings(self, jobs: Sequence[Job]) -> None:
        """Check the settings; see `wrong_settings`.

        Raises:
            UpcycleError: some are wrong; the text has each setting to change.
        """
        if wrong := self.wrong_settings(jobs):
            raise UpcycleError.together(wrong)

    @abstractmethod
    def check(self, jobs: Sequence[Job]) -> None:
        """Check the settings, and ask the scheduler whether it would take these jobs; start and write nothing.

        Raises:
            UpcycleError: it would refuse one; the text has the reason and the setting to change.
        """

    @abstractmethod
    def render(self, job: Job) -> dict[str, str]:
        """Render the files of a job, by name; needs no scheduler."""

    def masked(self) -> Self:
        """Return this scheduler with secrets hidden in what it renders, to be shown."""
        shown = copy.copy(self)
        shown.executor = copy.copy(self.executor)
        for name, value in _masked_settings(vars(self.executor)).items():
            setattr(shown.executor, name, value)
        if table := getattr(self.executor, "stages", None):
            shown.executor.stages = {stage: settings | _masked_settings(settings) for stage, settings in table.items()}
        return shown

    def write(self, job: Job, folder: Path) -> list[Path]:
        """Write the files of a job to submit, for its owner alone if they hold a secret; return the files."""
        folder.mkdir(parents=True, exist_ok=True)
        shown = self.masked().render(job)
        files = {folder / name: text for name, text in self.render(job).items()}
        for path, text in files.items():
            write_private(path, text, private=text != shown[path.name])
        return list(files)

    def render_as(self, job: Job, identity: str) -> dict[str, str]:
        """Render the files of the job of this id as of now, under the names by which its folder keeps them."""
        return self.render(job)

    def render_chain(self, jobs: Sequence[Job]) -> dict[str, str]:
        """Return files, by name, with which the rendered jobs are submitted by hand; none by default."""
        return {}

    @abstractmethod
    def submit(self, job: Job, after: Sequence[str]) -> str:
        """Submit a job and return its id.

        Args:
            job: job to submit.
            after: ids of the jobs that must succeed first, where the scheduler holds back; empty elsewhere.
        """

    @abstractmethod
    def states(self, ids: Sequence[str]) -> Mapping[str, JobState]:
        """Ask the scheduler for the states of jobs; one that it does not know has ended."""

    @abstractmethod
    def cancel(self, ids: Sequence[str]) -> None:
        """Cancel jobs, those that wait and those that run."""

    @abstractmethod
    def cancel_command(self, identity: str) -> str:
        """Name the command that cancels a job, as a person types it."""

    @abstractmethod
    def logs(self, job: Job, identity: str) -> Sequence[Path]:
        """Return the log files of a job; they need not exist, nor lie on this machine."""

    @abstractmethod
    def resources(self, job: Job) -> dict[str, str]:
        """List what a job asks for, by name, for people: partition or queue, time, memory, GPUs, image."""

    def performance(self, job: Job) -> dict[str, str]:
        """Return NVIDIA's performance settings of a job, without those that the site replaces.

        Raises:
            UpcycleError: the site changes one that does not exist.
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
        """Return whether a stage of these settings runs in a container."""
        return True

    def sets_itself(self, settings: Any, name: str) -> bool:
        """Return whether the site's settings of a stage have a performance setting of this name already."""
        return name in getattr(settings, "env_vars", {})

    def save_limits(self, job: Job) -> Sequence[SaveLimit]:
        """Return the times within which a training has to save; none where no scheduler sets one."""
        return ()

    def goes_on(self, job: Job) -> bool:
        """Return whether a stage goes on in another job when the time of one is over."""
        return False

    def settings_for(self, stage: str) -> Any:
        """Return the executor with the fields that its table of stages sets for one of them."""
        return dataclasses.replace(self.executor, **getattr(self.executor, "stages", {}).get(stage, {}))


def _masked_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that may hold secrets, with the secrets hidden."""
    masks: dict[str, Callable[[Any], Any]] = {"env_vars": masked, "setup_lines": masked_text}
    return {name: mask(settings[name]) for name, mask in masks.items() if settings.get(name)}


def asks_for_gpus(resources: Mapping[str, str]) -> bool:
    """Return whether what a job asks for, by name, has GPUs in it."""
    return any("gpu" in name.lower() and value not in ("", "0", "none") for name, value in resources.items())


def hub_variables(job: Job, given: Mapping[str, Any]) -> dict[str, str]:
    """Return where a stage in a container keeps models of the Hugging Face hub: where the next one finds them, too.

    Args:
        job: the stage.
        given: variables that the site sets; HF_HOME or HF_HUB_CACHE among them say it already.
    """
    return {} if {"HF_HOME", "HF_HUB_CACHE"} & set(given) else {"HF_HUB_CACHE": str(job.run_dir / "hub")}


def wrong_site(executor: Any, where: str, why: Mapping[str, str]) -> list[UpcycleError]:
    """List the required fields that a site has left out, and the fields that have no such value or do not exist.

    Args:
        executor: executor with the fields of its class, and `stages`.
        where: the file that the user may change, for the message.
        why: required field -> its meaning.
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
        for name in settings:
            setting = f"run.executor.stages.{stage}"
            if name not in fields:
                found.append(UpcycleError.unknown(setting + _UNKNOWN_KEY, name, fields))
            elif name in _OF_ALL_STAGES:
                fix = f"set run.executor.{name}"
                found.append(
                    UpcycleError(f"{setting}.{name}", kind="refused", got="cannot differ between stages", fix=fix)
                )
    price = executor.price_per_gpu_hour
    return found + failures(
        [
            lambda: require_card(executor.card),
            lambda: check_number("run.executor.write_gib_s", executor.write_gib_s, 0.001),
            lambda: check_number("run.executor.price_per_gpu_hour", 0 if price is None else price, 0),
        ]
    )


def require_card(name: str) -> None:
    """Check that the planner knows a kind of GPU.

    Raises:
        UpcycleError: it does not.
    """
    if name not in gpu_names():
        raise UpcycleError.unknown("run.executor.card", name, gpu_names())


def require_variables(names: Iterable[str]) -> None:
    """Check that bash exports variables of these names.

    Raises:
        UpcycleError: it does not export one of them.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            fix = f"rename it, as {re.sub('[^A-Za-z0-9_]', '_', name)}"
            expected = "letters, digits and _, beginning with no digit"
            raise UpcycleError("run.executor.env_vars", got=f"'{name}'", expected=expected, fix=fix)


def require_gpus(job: Job, per_node: int | None, fix: str = "set it") -> None:
    """Check that a stage which needs GPUs asks for them, and that a node has one for each rank of a training.

    A training needs GPUs as `stage_jobs.needs_gpus` says; evaluation needs one if a training of the run does.

    Args:
        job: job of the stage.
        per_node: GPUs that it asks for, per node; None: some, and their number is not known.
        fix: what to do where it asks for none.

    Raises:
        UpcycleError: it asks for none, or for too few.
    """
    setting = f"run.executor.stages.{job.name}.gpus_per_node"
    if job.gpus and per_node == 0:
        trains = f"{job.gpus}, one for each rank of the recipe"
        needs = trains if job.is_training else "1 or more, because the stage runs models that need GPUs"
        raise UpcycleError(setting, got=0, expected=needs, fix=fix)
    if per_node and job.is_training and per_node < job.ranks_per_node:
        expected = f"at least {job.ranks_per_node}, the number of ranks per node"
        fix = f"raise it, or set {job.name}.trainer.devices={per_node} and more trainer.num_nodes"
        raise UpcycleError(setting, got=per_node, expected=expected, fix=fix)
