"""The plan of a run, what a stage is, and the settings that each stage depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.finished import MANIFEST
from nemo_upcycle.pipeline.markers import StageFolder
from nemo_upcycle.utils.files import read_json, sha256_file, write_json


PLAN = "pipeline.json"


@dataclass(frozen=True)
class RunPlan:
    """Everything that the stages of a run need to know, as plain values.

    Recipes are NeMo-Run's own serialised form: a stage builds them only after it has checked that it may start.

    Args:
        recipe: name of the upcycling recipe, for titles.
        dense: address of the dense parent.
        data: a blend (a name in `conf/data`, or a YAML file), or a finished folder of `nemo-upcycle data`.
        evaluation: a name in `conf/evaluation`, or a YAML file.
        pretrain: the serialised recipe of the upcycled model.
        dense_ct: the serialised recipe of the dense baseline; None omits it.
    """

    recipe: str
    dense: str
    data: str
    evaluation: str
    pretrain: str
    dense_ct: str | None

    def write(self, run_dir: Path) -> None:
        """Write the plan to the run's folder, where the stages read it."""
        write_json(run_dir / PLAN, asdict(self))

    @staticmethod
    def read(run_dir: Path) -> RunPlan:
        """Read the plan of a run."""
        return RunPlan(**read_json(run_dir / PLAN))

    def setting(self, name: str) -> Any:
        """Return a field as the markers hash it: the content, not the name, of YAML files and data folders."""
        value = getattr(self, name)
        if name == "data" and (manifest := Path(value) / MANIFEST).is_file():
            return sha256_file(manifest)
        is_file = isinstance(value, str) and value.endswith((".yaml", ".yml")) and Path(value).expanduser().is_file()
        return sha256_file(Path(value).expanduser()) if is_file else value


@dataclass(frozen=True)
class Stage:
    """One stage.

    Args:
        name: of the stage and of its folder.
        work: the function that does it; takes the run's folder and plan, returns what the marker reports.
        after: stages whose results it reads.
        settings: fields of the plan that it depends on.
        parallel: whether it runs on all ranks of the training job.
        resumable: whether a new start continues where a killed one stopped.
    """

    name: str
    work: Callable[[Path, RunPlan], dict[str, Any]]
    after: tuple[str, ...]
    settings: tuple[str, ...]
    parallel: bool = False
    resumable: bool = False

    def folder(self, run_dir: Path) -> StageFolder:
        """Return its folder in a run."""
        return StageFolder(run_dir, self.name, self.after)

    def settings_of(self, plan: RunPlan) -> dict[str, Any]:
        """Return the values of its settings."""
        return {name: plan.setting(name) for name in self.settings}

    def is_done(self, run_dir: Path, plan: RunPlan) -> bool:
        """Return whether it finished from its present inputs; the stages before it must be done."""
        folder = self.folder(run_dir)
        return folder.is_done(folder.inputs(self.settings_of(plan)))
