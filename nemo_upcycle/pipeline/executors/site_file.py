"""Read executors from conf/executors or a site's own YAML file, and find the scheduler of each executor."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nemo_run as run

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.base import Cluster, is_local
from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
from nemo_upcycle.pipeline.executors.slurm import SlurmScheduler
from nemo_upcycle.pipeline.stages import BY_NAME
from nemo_upcycle.utils.conf import (
    field_values,
    members,
    packaged,
    packaged_names,
    parse_yaml,
    read_conf,
)


#: The schedulers of this package.
CLUSTERS: tuple[type[Cluster], ...] = (
    SlurmScheduler,
    KubernetesScheduler,
)
#: Class of a scheduler's settings, by the name after `executor:` in a YAML file.
KINDS: dict[str, type] = {cluster.name: cluster.settings_class for cluster in CLUSTERS}
#: Fields that the chain sets itself. A value says what a user does instead of setting the field.
_OWN = {
    "stages": "set run.executor.stages.STAGE.FIELD",
    "nodes": "set pretrain.trainer.num_nodes and dense_ct.trainer.num_nodes",
    "ntasks_per_node": "set pretrain.trainer.devices and dense_ct.trainer.devices",
    "job_dir": "set dir",
    "dependencies": "omit it: each stage waits for the stages that it needs",
    "retries": "omit it: a stopped training starts again as long as it makes progress",
}


def cluster_for(executor: Any) -> Cluster | None:
    """Return the scheduler of an executor; None for this machine.

    Raises:
        UpcycleError: this package does not support the executor.
    """
    if is_local(executor):
        return None
    found = next((cluster for cluster in CLUSTERS if cluster.takes(executor)), None)
    if found is None:
        expected = " or ".join(("this machine", *(cluster.label for cluster in CLUSTERS)))
        raise UpcycleError("run.executor", got=type(executor).__name__, expected=expected, fix="name another executor")
    return found(executor)


def executor_names() -> list[str]:
    """Return the names of the package's own executor files."""
    return packaged_names("executors")


def is_described(name: str) -> bool:
    """Return whether a name is in conf/executors or is the path of a YAML file; otherwise it names a factory."""
    return name.endswith((".yaml", ".yml")) or name in executor_names()


def read_executor(name: str, overrides: Sequence[str] = ()) -> run.Executor:
    """Make the executor that a YAML file describes.

    Args:
        name: a name in conf/executors, or the path of a `.yaml` or `.yml` file.
        overrides: `FIELD=VALUE` and `stages.STAGE.FIELD=VALUE`; `FIELD.ENTRY` sets one entry of a mapping, as in
            `env_vars.HF_HOME=/hf`.

    Raises:
        UpcycleError: a key or a stage does not exist, or a value does not have its field's type.

    Example:
        >>> read_executor("slurm", ["account=me", "stages.pretrain.time=08:00:00"]).stages["pretrain"]["time"]
        '08:00:00'
    """
    content, path, _ = read_conf("executors", name, "executor")
    kind = str(content.pop("executor", ""))
    if kind not in KINDS:
        raise UpcycleError.unknown(f"{path}: executor", kind, KINDS)
    schema, own = KINDS[kind], executor_names()
    shown = f"conf/executors/{name}.yaml" if name in own else str(path)
    explained = packaged("executors") / f"{kind if kind in own else 'slurm'}.yaml"
    typed, typed_stages = _typed(overrides, schema)
    common: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    for prefix, table, given in (
        (f"{shown}: ", content.pop("stages", None), content),
        ("run.executor.", typed_stages, typed),
    ):
        common |= _added(common, given, _checked(prefix, given, schema, explained))
        of_stages = field_values(prefix, {"stages": table}, _Stages, explained)["stages"]
        for stage, settings in of_stages.items():
            if stage not in BY_NAME:
                raise UpcycleError.unknown(f"{prefix}stages: stage", stage, BY_NAME)
            found = _checked(f"{prefix}stages.{stage}.", settings or {}, schema, explained)
            mine = stages.setdefault(stage, {})
            mine |= _added({**common, **mine}, settings or {}, found)
    for name in typed:  # if every stage sets the field itself, the typed value would be ignored
        if all(name in stages.get(stage, {}) for stage in BY_NAME) and not isinstance(typed[name], _Entries):
            fix = f"set run.executor.stages.STAGE.{name}"
            raise UpcycleError(
                f"run.executor.{name}", kind="refused", got=f"has no effect: {shown} sets it for each stage", fix=fix
            )
    executor: run.Executor = schema(**common, stages=stages)
    return executor


@dataclass
class _Stages:
    """The table of stages. For each stage, it has the fields of the executor that are set for this stage."""

    stages: dict[str, dict[str, Any] | None] = field(default_factory=dict)


class _Entries(dict[str, Any]):
    """Entries of a mapping that were given one by one, and are added to the mapping's earlier entries."""


def _added(before: Mapping[str, Any], given: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked settings. Entries that were given one by one are added to the earlier mapping."""
    return {
        name: {**(before.get(name) or {}), **value} if isinstance(given[name], _Entries) else value
        for name, value in found.items()
    }


def _typed(words: Sequence[str], schema: type) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Parse the command line's settings for all stages and for single stages. Text fields keep words unchanged."""
    kinds = typing.get_type_hints(schema)
    common: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    for word in words:
        key, _, text = word.partition("=")
        found, name = common, key
        if key.startswith("stages."):
            stage, _, name = key.removeprefix("stages.").partition(".")
            found = stages.setdefault(stage, {})
        kind, (mapping, dot, entry) = kinds.get(name, Any), name.partition(".")
        if dot and typing.get_origin(kinds.get(mapping)) is dict and isinstance(found.get(mapping, {}), dict):
            found, name, kind = found.setdefault(mapping, _Entries()), entry, typing.get_args(kinds[mapping])[1]
        taken = members(kind)
        if text in ("null", "None"):
            found[name] = None
        elif str in taken and not (bool in taken and text.lower() in ("true", "false")):
            found[name] = text
        else:
            found[name] = text  # invalid YAML is kept as text, which the field then refuses
            with suppress(UpcycleError):
                found[name] = parse_yaml(text, f"run.executor.{key}")
    return common, stages


def _checked(prefix: str, given: dict[str, Any], schema: type, explained: Path) -> dict[str, Any]:
    """Convert settings to the types of the executor's fields; see `field_values`."""
    for name, value in given.items():
        if name in _OWN:
            got = f"is {value}, but the pipeline sets it itself"
            raise UpcycleError(prefix + name, kind="refused", got=got, fix=_OWN[name])
        if name == "time" and type(value) is int:
            fix = 'put it in quotes, as in "24:00:00"'
            raise UpcycleError(
                prefix + name, got=value, expected="text, because YAML reads 24:00:00 as a number", fix=fix
            )
    found = field_values(prefix, given, schema, explained)
    for name, value in found.get("env_vars", {}).items():
        if value is None and name not in performance.names():  # null can remove only a performance setting
            raise UpcycleError(f"{prefix}env_vars.{name}", got="null", expected="text", fix='put it in quotes: ""')
    return found
