"""What an executor of this package does: check, render, submit, watch and cancel the jobs of a chain's stages."""

from __future__ import annotations

import copy
import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.jobs import Job, JobState, SaveLimit
from nemo_upcycle.pipeline.executors.performance import settings_for
from nemo_upcycle.utils.masking import masked, masked_text, write_private


if TYPE_CHECKING:
    from typing_extensions import Self


#: The card of an executor that names none: the recipes are written for it.
USUAL_CARD = "h100"
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
    """A scheduler that runs jobs; one subclass an executor, in one file, and a line in `settings.CLUSTERS`.

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
    def check_settings(self, jobs: Sequence[Job]) -> None:
        """Check without the scheduler that the site's settings are complete and fit these jobs.

        Raises:
            UpcycleError: they do not; the text has the setting to change.
        """

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
        found = settings_for(
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


def require_settings(executor: Any, where: str, why: Mapping[str, str]) -> None:
    """Check that a site has filled in the required fields, and that the table of stages sets fields that exist.

    Args:
        executor: executor with the fields of its class, and `stages`.
        where: the file that the user may change, for the message.
        why: required field -> its meaning.

    Raises:
        UpcycleError: a field is missing or does not exist.
    """
    for name, what in why.items():
        if getattr(executor, name) == MISSING:
            fix = f"give run.executor.{name}=..., or {where}"
            raise UpcycleError(f"run.executor.{name}", got="nothing", expected=what, fix=fix)
    fields = {field.name for field in dataclasses.fields(executor) if field.init} - {"stages"}
    for stage, settings in executor.stages.items():
        for name in settings:
            if name not in fields:
                raise UpcycleError.unknown(f"run.executor.stages.{stage}: key", name, fields)


def require_variables(names: Iterable[str]) -> None:
    """Check that bash exports variables of these names.

    Raises:
        UpcycleError: it does not export one of them.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            fix = f"rename it, as {re.sub('[^A-Za-z0-9_]', '_', name)}"
            expected = "a name of letters, digits and _, no digit first"
            raise UpcycleError("run.executor.env_vars", got=f"'{name}'", expected=expected, fix=fix)


def require_gpus(job: Job, per_node: int) -> None:
    """Check that a node has a GPU for each rank of a job.

    Raises:
        UpcycleError: there are fewer.
    """
    if per_node < job.ranks_per_node:
        setting = f"run.executor.stages.{job.name}.gpus_per_node"
        expected = f"at least {job.ranks_per_node}, the ranks per node"
        fix = f"raise it, or set {job.name}.trainer.devices={per_node} and more trainer.num_nodes"
        raise UpcycleError(setting, got=per_node, expected=expected, fix=fix)
