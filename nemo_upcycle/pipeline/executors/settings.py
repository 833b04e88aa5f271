"""Executors as conf/executors and a site's own YAML file describe them, and the scheduler of each."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any

import nemo_run as run
import yaml

from nemo_upcycle.errors import UpcycleError, did_you_mean
from nemo_upcycle.pipeline.executors import performance
from nemo_upcycle.pipeline.executors.base import MISSING, Cluster
from nemo_upcycle.pipeline.executors.kubernetes import KubernetesScheduler
from nemo_upcycle.pipeline.executors.slurm import SlurmScheduler
from nemo_upcycle.pipeline.stages import BY_NAME
from nemo_upcycle.utils.conf import packaged_names, read_conf
from nemo_upcycle.utils.masking import MASK, is_secret, masked_text


#: The schedulers of this package.
CLUSTERS: tuple[type[Cluster], ...] = (
    SlurmScheduler,
    KubernetesScheduler,
)
#: Their settings, by the name that a YAML file gives with `executor:`.
KINDS: dict[str, type] = {cluster.name: cluster.settings_class for cluster in CLUSTERS}
_STAGES = "stages."
#: Fields that the chain sets itself: what to do instead of giving one.
_OWN = {
    "origins": "leave it out",
    "stages": "set run.executor.stages.STAGE.FIELD",
    "nodes": "set pretrain.trainer.num_nodes and dense_ct.trainer.num_nodes",
    "ntasks_per_node": "set pretrain.trainer.devices and dense_ct.trainer.devices",
    "job_dir": "set dir, the run's folder",
    "dependencies": "leave it out: each stage waits for those that it needs",
    "retries": "leave it out: a training that stopped starts again as long as it gets further",
}
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "a mapping, as {NAME: VALUE}",
    list: "a list, as [VALUE]",
    types.NoneType: "null",
}
_EXAMPLES = {bool: "true", int: "8", float: "0.5", dict: "{NAME: VALUE}", list: "[VALUE]"}


def cluster_for(executor: Any) -> Cluster | None:
    """Return the scheduler of an executor; None for this machine and for the executors of others."""
    return next((cluster(executor) for cluster in CLUSTERS if cluster.takes(executor)), None)


def executor_names() -> list[str]:
    """Return the names of the package's own files."""
    return packaged_names("executors")


def is_described(name: str) -> bool:
    """Return whether a name is one of conf/executors or the path of a YAML file, and no factory's."""
    return name.endswith((".yaml", ".yml")) or name in executor_names()


def read_executor(name: str, overrides: Sequence[str] = ()) -> run.Config[Any]:
    """Return the executor that a YAML file describes.

    Args:
        name: one of conf/executors, or the path of a `.yaml` or `.yml` file.
        overrides: `FIELD=VALUE` and `stages.STAGE.FIELD=VALUE`.

    Raises:
        UpcycleError: a key or a stage does not exist, or a value is not of its field's type.

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
    fields = {field.name: field for field in dataclasses.fields(KINDS[kind]) if field.init}
    shown = f"conf/executors/{name}.yaml" if name in executor_names() else str(path)
    stages = _stages_of(content.pop("stages", None), shown)
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
        stages[stage] = _checked(settings, fields, f"{_STAGES}{stage}.", origins)
    required = {name: MISSING for name, field in fields.items() if _default(field) == MISSING}
    common = required | _checked(content, fields, "", origins)
    return run.Config(KINDS[kind], **common, stages=stages, origins=origins)


def _stages_of(table: Any, shown: str) -> dict[str, dict[str, Any]]:
    """Return the table of stages of a file; what is left blank in it is empty."""
    try:
        return {
            str(stage): {str(name): value for name, value in (settings or {}).items()}
            for stage, settings in (table or {}).items()
        }
    except AttributeError:
        raise UpcycleError(
            f"stages of the executor in {shown}",
            got=table,
            expected="a mapping of stages to settings",
            fix="write stages: {pretrain: {FIELD: VALUE}}",
        ) from None


def _value(text: str, field: dataclasses.Field[Any] | None) -> Any:
    """Return the value of a word on the command line; text stays text where a field takes text."""
    kinds = _kinds(field.type) if field else []
    if text in ("null", "None"):
        return None
    if str in kinds and not (bool in kinds and text.lower() in ("true", "false")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # which the field does not take


def _kinds(kind: Any) -> list[Any]:
    """Return what a field's type allows: the members of a union, or itself."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return list(typing.get_args(kind)) if is_union else [kind]


def _checked(
    settings: dict[str, Any], fields: dict[str, dataclasses.Field[Any]], where: str, origins: dict[str, str]
) -> dict[str, Any]:
    """Return settings as their fields take them.

    Args:
        settings: by field.
        fields: of the executor.
        where: what the settings' names start with.
        origins: by setting, where its value is from.
    """
    checked = {}
    for name, value in settings.items():
        full, origin = f"run.executor.{where}{name}", origins[f"{where}{name}"]
        if name not in fields:
            hint = did_you_mean(name, fields.keys() - _OWN, prefix=f"run.executor.{where}")
            raise UpcycleError(f"setting '{where}{name}' of the executor ({origin}) does not exist.{hint}")
        if name in _OWN:
            raise UpcycleError(full, got=f"{value} ({origin})", expected="nothing: the chain sets it", fix=_OWN[name])
        if name == "time" and type(value) is int:
            reads = ": YAML reads 24:00:00 as a number" if value >= 60 else ""  # the least that has a colon is 1:00
            raise UpcycleError(
                full,
                got=f"{value}{reads} ({origin})",
                expected="text",
                fix=f'put it in quotes: "{"24:00:00" if reads else f"00:{value:02}:00"}"',
            )
        if name == "env_vars" and isinstance(value, dict):
            _check_variables(full, value, origin)
        try:
            checked[name] = _fitted(value, fields[name])
        except TypeError:
            kinds = [typing.get_origin(kind) or kind for kind in _kinds(fields[name].type)]
            example = f"write, for example, {full}={_EXAMPLES.get(kinds[0], 'text')}"
            raise UpcycleError(
                full,
                got=f"{masked_text(repr(value)) if name == 'env_vars' else repr(value)} ({origin})",
                expected=" or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds),
                fix="put it in quotes" if isinstance(value, bool) and str in kinds else example,
            ) from None
    return checked


def _check_variables(where: str, variables: dict[str, Any], origin: str) -> None:
    """Check that variables have texts or numbers: YAML reads some words as something else.

    Null removes one of NVIDIA's performance settings.
    """
    for name, value in variables.items():
        is_removed = value is None and name in performance.names()
        if not is_removed and type(value) not in (str, int, float):
            word = MASK if is_secret(name) else json.dumps(value, default=str)
            quoted = "" if value is None else word
            raise UpcycleError(
                f"{where}: variable {name}",
                got=f"{word} without quotes ({origin})",
                expected="text",
                fix=f'write {name}: "{quoted}"',
            )


def _fitted(value: Any, field: dataclasses.Field[Any]) -> Any:
    """Return a value as a field takes it: for null its default, and numbers as text where it takes text.

    Raises:
        TypeError: the field does not take such a value.
    """
    if field.name == "env_vars" and isinstance(value, dict):  # null removes a performance setting
        given = {name: entry for name, entry in value.items() if entry is not None or name not in performance.names()}
        return _as_kind(given, field.type) | {name: None for name in value if name not in given}
    wants_default = value is None and types.NoneType not in _kinds(field.type)
    return _default(field) if wants_default else _as_kind(value, field.type)


def _default(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default; "???" without one."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return MISSING if field.default is dataclasses.MISSING else field.default


def _as_kind(value: Any, wanted: Any) -> Any:
    kinds = _kinds(wanted)
    if value is False and {bool, str, types.NoneType} <= set(kinds):
        return None  # NeMo-Run would write --exclusive=False, which Slurm refuses
    for kind in kinds:
        origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)[-1:]
        if type(value) is origin:  # a bool is no number
            if origin is dict and inner == (str,):
                return {name: _as_kind(entry, str) for name, entry in value.items()}
            return [_as_kind(entry, str) for entry in value] if origin is list and inner == (str,) else value
    if float in kinds and type(value) is int:
        return value
    if str in kinds and type(value) in (int, float):
        return str(value)  # `mem: 0` is as good as `mem: "0"`
    raise TypeError
