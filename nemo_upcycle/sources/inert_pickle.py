"""Pickles that somebody else wrote, without what they name: classes and functions become inert."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any


#: Descriptions of a run are some kilobytes; random states, which lie beside them, some megabytes.
_MAX_BYTES = 64 << 20


class Inert:
    """Stands in for a class or function that a pickle names: keeps what it is given, and does nothing with it.

    A pickle can set attributes of whatever it has imported. Of this class it cannot: `__setstate__` takes that over,
    and has no instance there. The items of a list or dict of another class are ignored.
    """

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Ignore an item."""


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        return None  # a tensor's numbers


def read_saved(path: Path) -> Any:
    """Return what `torch.save` wrote, without tensors and without running anything: dicts, lists, numbers, texts.

    Raises:
        OSError, ValueError: it cannot be read, or is no such file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            member = next(one for one in archive.infolist() if one.filename.endswith("/data.pkl"))
            if member.file_size > _MAX_BYTES:
                raise ValueError(f"a description of {member.file_size} bytes")
            with archive.open(member) as handle:
                return _InertUnpickler(handle).load()
    except (OSError, ValueError):
        raise
    except Exception as error:  # whatever a damaged pickle leads to
        raise ValueError(f"damaged ({type(error).__name__})") from None
