"""Executors as conf/executors and a site's own YAML file describe them, and the scheduler of each."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import nemo_run as run
import yaml

from nemo_upcycle.errors import UpcycleError, did_you_mean
from nemo_upcycle.pipeline.executors.base import Cluster
from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
from nemo_upcycle.pipeline.executors.kubernetes_settings import KubernetesExecutor
from nemo_upcycle.pipeline.executors.slurm import SlurmScheduler
from nemo_upcycle.pipeline.executors.slurm_settings import StagedSlurmExecutor
from nemo_upcycle.pipeline.stages import BY_NAME
from nemo_upcycle.utils.conf import read_conf


#: By the name that a YAML file gives with `executor:`.
KINDS: dict[str, type] = {"slurm": StagedSlurmExecutor, "kubernetes": KubernetesExecutor}
#: Which scheduler an executor's jobs go to.
SCHEDULERS: dict[type, type[Cluster]] = {
    run.SlurmExecutor: SlurmScheduler,
    KubernetesExecutor: KubernetesScheduler,
}
_STAGES = "stages."
#: Set by the chain, not by people.
_OWN = {"stages", "origins"}


def cluster_for(executor: Any) -> Cluster | None:
    """Return the scheduler of an executor; None for this machine and for the executors of others."""
    return next((scheduler(executor) for kind, scheduler in SCHEDULERS.items() if isinstance(executor, kind)), None)


def executor_names() -> list[str]:
    """Return the names of the package's own files."""
    return sorted(path.stem for path in Path(str(resources.files("nemo_upcycle.conf"))).glob("executors/*.yaml"))


def is_described(name: str) -> bool:
    """Return whether a name is one of conf/executors or the path of a YAML file, and no factory's."""
    return name.endswith((".yaml", ".yml")) or name in executor_names()


def read_executor(name: str, overrides: Sequence[str] = ()) -> run.Config[Any]:
    """Return the executor that a YAML file describes.

    Args:
        name: one of conf/executors, or the path of a `.yaml` or `.yml` file.
        overrides: `FIELD=VALUE` and `stages.STAGE.FIELD=VALUE`.

    Raises:
        UpcycleError: a key or a stage does not exist.

    Example:
        >>> read_executor("slurm", ["account=me", "stages.pretrain.time=08:00:00"]).stages["pretrain"]["time"]
        '08:00:00'
    """
    content, path, _ = read_conf("executors", name, "executor")
    kind = content.pop("executor", None)
    if kind not in KINDS:
        raise UpcycleError(
            f"executor in {path}", got=kind, expected=" or ".join(KINDS), fix="say which scheduler it is for"
        )
    fields = {field.name: field.type for field in dataclasses.fields(KINDS[kind]) if field.init}
    stages = content.pop("stages", None) or {}
    shown = f"conf/executors/{name}.yaml" if name in executor_names() else str(path)
    origins = dict.fromkeys(content, shown) | {
        f"{_STAGES}{stage}.{key}": shown for stage in stages for key in stages[stage]
    }
    for word in overrides:
        key, _, text = word.partition("=")
        origins[key] = "command line"
        if key.startswith(_STAGES):
            stage, _, setting = key.removeprefix(_STAGES).partition(".")
            stages.setdefault(stage, {})[setting] = _value(text, fields.get(setting))
        else:
            content[key] = _value(text, fields.get(key))
    for stage, settings in stages.items():
        if stage not in BY_NAME:
            raise UpcycleError.unknown(f"stage of the executor in {path}", stage, BY_NAME)
        _normalise(settings, fields, f"{_STAGES}{stage}.", path)
    _normalise(content, fields, "", path)
    return run.Config(KINDS[kind], **content, stages=stages, origins=origins)


def _value(text: str, kind: Any) -> Any:
    """Return the value of a word on the command line; text stays text where a field takes text."""
    if text in ("null", "None"):
        return None
    return text if _takes(kind, str) else yaml.safe_load(text)


def _takes(kind: Any, wanted: type) -> bool:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return kind is wanted or (is_union and wanted in typing.get_args(kind))


def _normalise(settings: dict[str, Any], fields: dict[str, Any], where: str, path: Path) -> None:
    """Check that settings exist, and turn numbers into text where a field takes text, in place."""
    for name, value in settings.items():
        if name not in fields or name in _OWN:
            hint = did_you_mean(name, fields, prefix=f"run.executor.{where}")
            raise UpcycleError(f"setting '{where}{name}' of the executor in {path} does not exist.{hint}")
        if name == "time" and isinstance(value, int):
            raise UpcycleError(
                f"{where}time of the executor in {path}",
                got=f"{value}: YAML reads 24:00:00 as a number",
                expected="text",
                fix='put it in quotes: "24:00:00"',
            )
        if isinstance(value, (int, float)) and _takes(fields[name], str) and not _takes(fields[name], type(value)):
            settings[name] = str(value)  # `mem: 0` is as good as `mem: "0"`
