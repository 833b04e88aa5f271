"""Read YAML files (the package's files in `conf/` by name, users' files by path), and check them with a dataclass."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.masking import MASK, is_secret, masked_text
from nemo_upcycle.utils.references import escaped, resolved
from nemo_upcycle.utils.validation import check_fields
from nemo_upcycle.utils.writers import yaml_text


_T = TypeVar("_T")
#: PyYAML's C loader is 8 times as fast. PyYAML can be built without this loader.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
#: The only kind of files that may compute values.
_COMPUTES = "executors"
#: folder of `conf/` -> the file in it whose comments explain the keys
_TEMPLATES = {"data": "text", "chat": "messages", "evaluation": "demo", "ablations": "laptop", "executors": "slurm"}
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
#: type of a field -> types of YAML values that it accepts; a text field accepts numbers, but a number field does not
#: accept a bool
_TAKEN = {str: (str, int, float), int: (int,), float: (int, float), bool: (bool,), type(None): (type(None),)}


class Conf(NamedTuple):
    """A configuration.

    Attributes:
        content: content of the file, with references resolved.
        path: path of the file.
        folder: base folder of the relative paths in the file. If the file has the key `folder`, the base folder is the
            key's value. Otherwise the base folder is the folder of a user's file, or the current folder for a file of
            the package.
    """

    content: dict[str, Any]
    path: Path
    folder: Path


def packaged(kind: str) -> Path:
    """Return the folder with the package's files of one kind: `data`, `chat`, `evaluation`, `ablations`, ..."""
    return Path(str(resources.files("nemo_upcycle.conf"))) / kind


def packaged_names(kind: str) -> list[str]:
    """Return the names of the package's own files of a kind."""
    return sorted(path.stem for path in packaged(kind).glob("*.yaml"))


def template(kind: str) -> Path:
    """Return the package's file whose comments explain every key of a kind; error messages can name it.

    A wheel contains this file, too.
    """
    return packaged(kind) / f"{_TEMPLATES[kind]}.yaml"


def read_conf(kind: str, name: str | Path, what: str) -> Conf:
    """Read a YAML file.

    Args:
        kind: folder of `conf/` with the package's own files (`data`, `evaluation`, ...).
        name: name of a file in this folder without its suffix, or the path of a `.yaml` or `.yml` file.
        what: name of the kind of file in error messages, for example "suite".

    Raises:
        UpcycleError: the file is missing, unreadable or not a YAML mapping.

    Example:
        >>> read_conf("evaluation", "demo", "suite").path.name
        'demo.yaml'
    """
    path = Path(name).expanduser()
    folder = path.absolute().parent
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in (names := packaged_names(kind)):
            raise UpcycleError.unknown(what, str(name), [*names, "PATH.yaml"])
        path, folder = packaged(kind) / f"{name}.yaml", Path()
    text = _text(path, where := f"{what} {path}")
    read = _content.__wrapped__ if "${" in text else _content  # environment variables may change: do not cache
    content = copy.deepcopy(read(text, where, kind == _COMPUTES))
    if not isinstance(content, dict) or not content:
        got = f"a {type(content).__name__}" if content else "nothing"
        raise UpcycleError(
            where, kind="state", got=f"holds {got} instead of keys", fix=f"write keys as in {template(kind)}"
        )
    named = {str(key): value for key, value in content.items()}
    return Conf(named, path, Path(named.pop("folder", folder)))


@lru_cache  # a command reads its suite and its blend several times, and OmegaConf needs 50 ms for each read
def _content(text: str, where: str, computes: bool) -> Any:
    """Read YAML text with OmegaConf."""
    from omegaconf import OmegaConf, errors

    try:
        return resolved(OmegaConf.create(text), where, computes=computes)
    except (errors.OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise _invalid(where, error) from None


def read_yaml(path: Path, what: str = "file") -> Any:
    """Read a YAML file as plain values.

    Args:
        path: the file.
        what: word for the file in errors.

    Raises:
        UpcycleError: the file is missing, unreadable or invalid YAML.

    Example:
        >>> read_yaml(packaged("evaluation") / "demo.yaml")["seed"]
        1234
    """
    return parse_yaml(_text(path, f"{what} {path}"), f"{what} {path}")


def parse_yaml(text: str, where: str) -> Any:
    """Return YAML as plain values.

    Args:
        text: the YAML.
        where: source of the text, for errors.

    Raises:
        UpcycleError: the text is invalid YAML.

    Example:
        >>> parse_yaml("{a: [1, 2]}", "mine")
        {'a': [1, 2]}
    """
    try:
        return yaml.load(text, Loader=_LOADER)
    except (yaml.YAMLError, ValueError) as error:
        raise _invalid(where, error) from None


def overridden(conf: Conf, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the content of a configuration with overrides from the command line merged into it.

    Args:
        conf: the configuration.
        overrides: words `key=value`, for example `sources.web.weight=0.8`.

    Raises:
        UpcycleError: an override is not `key=value`, or cannot be merged.

    Example:
        >>> overridden(Conf({"a": {"b": 1}}, Path("mine.yaml"), Path()), ["a.b=2"])
        {'a': {'b': 2}}
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    where = f"overrides of {conf.path}"
    try:
        merged = OmegaConf.merge(
            escaped(conf.content), *(OmegaConf.from_dotlist([override]) for override in overrides)
        )
        return dict(resolved(merged, where))
    except (OmegaConfBaseException, yaml.YAMLError, AttributeError, TypeError, ValueError):
        got = masked_text(" ".join(overrides))
        raise UpcycleError(
            where,
            kind="state",
            got=f"cannot be read as KEY=VALUE: {got}",
            fix="put values that contain [, {, : or # in quotes",
        ) from None


def conf_text(content: Any, width: int = 80) -> str:
    r"""Return values as YAML, escaped so that `read_conf` returns the same values and resolves no reference in them.

    Args:
        content: plain values.
        width: line width, see `yaml_text`.

    Example:
        >>> conf_text({"a": "${b}"})
        'a: \\${b}\n'
    """
    return yaml_text(escaped(content), width)


def _text(path: Path, where: str) -> str:
    """Return the text of a YAML file."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UpcycleError(
            where, kind="state", got=f"cannot be read: {error.strerror}", fix="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise UpcycleError(
            where, kind="state", got=f"is not UTF-8 text ({error})", fix="convert it with iconv"
        ) from None


def _invalid(where: str, error: Exception) -> UpcycleError:
    got = masked_text(" ".join(str(error).split()))  # put errors of several lines on one line
    return UpcycleError(where, kind="state", got=f"is not valid YAML: {got}", fix="correct that line")


def is_conf_file(name: str) -> bool:
    """Return whether a name is the path of a user's YAML file rather than the name of a packaged file.

    Example:
        >>> is_conf_file("sotu"), is_conf_file("/home/me/mine.yaml")
        (False, True)
    """
    return name.endswith((".yaml", ".yml"))


def as_dataclass(where: str, values: dict[str, Any], schema: type[_T], kind: str) -> _T:
    """Make an instance of a dataclass from the values of a YAML file.

    Args:
        where: the file, for errors.
        values: values of the file (lists, dicts and plain values).
        schema: the dataclass; its fields may be dataclasses, lists, dicts, unions and plain types.
        kind: folder of `conf/` whose template explains the keys.

    Raises:
        UpcycleError: a key does not exist or is missing, or a value has the wrong type or is invalid. The text names
            the key and the value.

    Example:
        >>> as_dataclass("mine.yaml", {"validation": 0.01}, HoldOut, "data")  # doctest: +SKIP
        HoldOut(validation=0.01, heldout=0.001)
    """
    config = typing.cast("_T", _made(f"{where}: ", values, schema, template(kind)))
    check_fields(where, config, template(kind))
    return config


def field_values(prefix: str, values: dict[Any, Any], schema: type, explained: Path) -> dict[str, Any]:
    """Convert YAML values to the types of a dataclass's fields; replace a blank value by the field's default.

    Args:
        prefix: text before a field's name in errors (`mine.yaml: `, or `run.executor.`).
        values: field -> value; fields may be missing.
        schema: the dataclass.
        explained: file that explains the fields.

    Raises:
        UpcycleError: see `as_dataclass`.
    """
    kinds = typing.get_type_hints(schema)
    defaults = {field.name: _default(field) for field in dataclasses.fields(schema) if field.init}
    found = {}
    for name, value in values.items():
        if name not in defaults:
            raise UpcycleError.unknown(f"{prefix.rstrip('.: ')}: key", str(name), defaults)
        has_default = defaults[name] is not dataclasses.MISSING
        is_blank = value is None and has_default and type(None) not in members(kinds[name])
        found[name] = defaults[name] if is_blank else _as(prefix + name, value, kinds[name], explained)
    return found


def members(kind: Any) -> tuple[Any, ...]:
    """Return the types that a union allows; for any other type, return only the type.

    Example:
        >>> members(int | None), members(list[str])
        ((<class 'int'>, <class 'NoneType'>), (list[str],))
    """
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _made(prefix: str, values: dict[Any, Any], schema: Any, explained: Path) -> Any:
    found = field_values(prefix, values, schema, explained)
    for field in dataclasses.fields(schema):
        if field.name not in found and _default(field) is dataclasses.MISSING:
            expected = _described(typing.get_type_hints(schema)[field.name])
            raise UpcycleError(
                prefix + field.name, kind="missing", got=f"is missing; expected {expected}", fix=f"see {explained}"
            )
    return schema(**found)


def _as(name: str, value: Any, wanted: Any, explained: Path) -> Any:
    """Convert a value to a type; `name` is the path of its key, for errors."""
    for member in members(wanted):
        origin, inner = typing.get_origin(member) or member, typing.get_args(member)
        if dataclasses.is_dataclass(member) and isinstance(value, dict):
            return _made(f"{name}.", value, member, explained)
        if origin is list and isinstance(value, list):
            return [_as(f"{name}[{number}]", one, inner[0], explained) for number, one in enumerate(value)]
        if origin is dict and isinstance(value, dict):
            return {str(key): _as(f"{name}.{key}", one, inner[1], explained) for key, one in value.items()}
        if member is Any:
            return value
        if type(value) in _TAKEN.get(member, ()):
            return value if value is None else member(value)
    shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    fix = f"see {explained}"
    if str in members(wanted) and isinstance(value, bool | None):
        fix = f'put it in quotes: "{shown if value is not None else ""}"'
    elif typing.get_origin(members(wanted)[0]) is list and type(value) in _TAKEN[str]:
        fix = f"write [{shown}]"
    if str in members(wanted) and is_secret(name.rpartition(".")[2]):
        shown = MASK
    raise UpcycleError(name, got=masked_text(shown), expected=_described(wanted), fix=fix)


def _described(wanted: Any) -> str:
    if len(kinds := members(wanted)) > 1:
        return " or ".join(map(_described, kinds))
    if typing.get_origin(wanted) is list:
        return f"a list, each {_described(typing.get_args(wanted)[0])}"
    return _WORDS.get(wanted, "keys")
