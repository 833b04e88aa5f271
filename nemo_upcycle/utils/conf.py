"""Read YAML files: the package's own of `conf/`, by name, and the user's, by path."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from nemo_upcycle.errors import UpcycleError


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
        packaged = Path(str(resources.files("nemo_upcycle.conf"))) / kind
        names = [entry.stem for entry in packaged.glob("*.yaml")]
        if str(name) not in names:
            raise UpcycleError.unknown(what, str(name), [*names, "PATH.yaml"])
        path, folder = packaged / f"{name}.yaml", Path()
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
    if not isinstance(content, dict):
        raise UpcycleError(f"{what} {path}", got=type(content).__name__, expected="keys", fix=f"see conf/{kind}")
    named = {str(key): value for key, value in content.items()}
    return Conf(named, path, Path(named.pop("folder", folder)))


def is_conf_file(name: str) -> bool:
    """Return whether a name is the path of a user's own YAML file, and not a name of the package's.

    Example:
        >>> is_conf_file("sotu"), is_conf_file("/home/me/mine.yaml")
        (False, True)
    """
    return name.endswith((".yaml", ".yml"))
