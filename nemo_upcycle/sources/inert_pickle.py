"""Plain values of a pickle that somebody else wrote: whatever it names, classes and functions, becomes inert."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any


#: Descriptions of a run are some kilobytes; random states, which lie beside them, some megabytes.
_MAX_BYTES = 64 << 20


class Inert:
    """Stands in for an object: keeps its fields, does nothing."""

    fields: dict[str, Any]

    def __new__(cls, *_: Any, **fields: Any) -> Inert:
        """Return one; a pickle need not call __init__."""
        made = super().__new__(cls)
        made.fields = dict(fields)
        return made

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.fields.update(state if isinstance(state, dict) else {})

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None:
        """Ignore an item."""

    def extend(self, values: Any) -> None:
        """Ignore items."""


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
