"""Read YAML files, the package's own of `conf/` by name and the user's by path, and check them against a dataclass."""

from __future__ import annotations

import dataclasses
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nemo_upcycle.errors import UpcycleError


_T = TypeVar("_T")
#: folder of `conf/` -> the file of it that explains the keys
_TEMPLATES = {"data": "text", "evaluation": "demo", "ablations": "laptop", "executors": "slurm"}
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
#: what a field of a kind takes from YAML; a bool is no number, and a number is text where text is wanted
_TAKEN = {str: (str, int, float), int: (int,), float: (int, float), bool: (bool,), type(None): (type(None),)}


class Conf(NamedTuple):
    """A configuration.

    Attributes:
        content: of the file, its references resolved.
        path: of the file.
        folder: where its relative paths start: what the file says in `folder`; else that of the user's file; for the
            package's, the current one.
    """

    content: dict[str, Any]
    path: Path
    folder: Path


def packaged(kind: str) -> Path:
    """Return the folder of the package's own files of a kind: `data`, `evaluation`, `ablations`, `executors`."""
    return Path(str(resources.files("nemo_upcycle.conf"))) / kind


def packaged_names(kind: str) -> list[str]:
    """Return the names of the package's own files of a kind."""
    return sorted(path.stem for path in packaged(kind).glob("*.yaml"))


def template(kind: str) -> Path:
    """Return the package's file of a kind whose comments explain every key: for errors, it is there in a wheel too."""
    return packaged(kind) / f"{_TEMPLATES[kind]}.yaml"


def read_conf(kind: str, name: str | Path, what: str) -> Conf:
    """Read a YAML file.

    Args:
        kind: the folder of `conf/` that holds the package's own files: `data` or `evaluation`.
        name: one of these without its suffix, or the path of a `.yaml` or `.yml` file.
        what: what the file describes, for errors.

    Raises:
        UpcycleError: the file is missing, unreadable or not a YAML mapping.

    Example:
        >>> read_conf("evaluation", "demo", "suite").path.name
        'demo.yaml'
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(name).expanduser()
    folder = path.absolute().parent
    if path.suffix not in (".yaml", ".yml"):
        if str(name) not in (names := packaged_names(kind)):
            raise UpcycleError.unknown(what, str(name), [*names, "PATH.yaml"])
        path, folder = packaged(kind) / f"{name}.yaml", Path()
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UpcycleError(
            f"{what} {path}", got=error.strerror, expected="a YAML file", fix="check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise UpcycleError(f"{what} {path}", got=error, expected="a YAML file", fix="convert it with iconv") from None
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        got = " ".join(str(error).split())  # some errors take three lines
        raise UpcycleError(f"{what} {path}", got=got, expected="valid YAML", fix="correct that line") from None
    if not isinstance(content, dict) or not content:
        got = type(content).__name__ if content else "nothing"
        raise UpcycleError(f"{what} {path}", got=got, expected="keys", fix=f"write them as in {template(kind)}")
    named = {str(key): value for key, value in content.items()}
    return Conf(named, path, Path(named.pop("folder", folder)))


def is_conf_file(name: str) -> bool:
    """Return whether a name is the path of a user's own YAML file, and not a name of the package's.

    Example:
        >>> is_conf_file("sotu"), is_conf_file("/home/me/mine.yaml")
        (False, True)
    """
    return name.endswith((".yaml", ".yml"))


def as_dataclass(where: str, values: Any, schema: type[_T], kind: str) -> _T:
    """Return what YAML says as an instance of a dataclass.

    Args:
        where: the file, for errors.
        values: what it says, of lists, dicts and plain values.
        schema: the dataclass; its fields may be dataclasses, lists, dicts, unions and plain types.
        kind: folder of `conf/` whose template explains the keys.

    Raises:
        UpcycleError: a key does not exist or is missing, or a value is of another type; the text names key and value.

    Example:
        >>> as_dataclass("mine.yaml", {"validation": 0.01}, HoldOut, "data")  # doctest: +SKIP
        HoldOut(validation=0.01, heldout=0.001)
    """
    return typing.cast("_T", _as(values, schema, f"{where}: ", "", kind))


def _as(value: Any, wanted: Any, where: str, key: str, kind: str) -> Any:
    """Return a value as a type takes it; `key` is where it stands in the file."""
    is_union = typing.get_origin(wanted) in (typing.Union, types.UnionType)
    members = typing.get_args(wanted) if is_union else (wanted,)
    for member in members:
        origin, inner = typing.get_origin(member) or member, typing.get_args(member)
        if dataclasses.is_dataclass(member) and isinstance(value, dict):
            return _fields(value, member, where, key, kind)
        if origin is list and isinstance(value, list):
            return [_as(one, inner[0], where, f"{key}[{number}]", kind) for number, one in enumerate(value)]
        if origin is dict and isinstance(value, dict):
            return {str(name): _as(one, inner[1], where, _below(key, name), kind) for name, one in value.items()}
        if member is Any:
            return value
        if type(value) in _TAKEN.get(member, ()):
            return value if value is None else member(value)
    expected = " or ".join(_described(member) for member in members)
    takes_one = any(typing.get_origin(member) is list for member in members)
    fix = f"write [{value!r}]" if takes_one and type(value) in _TAKEN[str] else f"see {template(kind)}"
    raise UpcycleError(f"{where}{key}", got=_shown(value), expected=expected, fix=fix)


def _fields(values: dict[Any, Any], schema: Any, where: str, key: str, kind: str) -> Any:
    types_of, fields = typing.get_type_hints(schema), {field.name: field for field in dataclasses.fields(schema)}
    for name in values:
        if name not in fields:
            raise UpcycleError.unknown(f"{where}{key + ': ' if key else ''}key", str(name), fields)
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            full, expected = f"{where}{_below(key, name)}", _described(types_of[name])
            raise UpcycleError(full, got="nothing", expected=expected, fix=f"see {template(kind)}")
    return schema(
        **{name: _as(value, types_of[name], where, _below(key, name), kind) for name, value in values.items()}
    )


def _below(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def _described(wanted: Any) -> str:
    origin, inner = typing.get_origin(wanted) or wanted, typing.get_args(wanted)
    if origin is list:
        return f"a list, each {_described(inner[0])}"
    return _WORDS.get(origin, "keys")


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
