"""The cache folder for downloaded and generated models, blends and texts."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError


CACHE_VARIABLE = "NEMO_UPCYCLE_CACHE"


def cache_folder(variables: Mapping[str, Any] = os.environ) -> Path:
    """Return the cache folder: `$NEMO_UPCYCLE_CACHE`, or `~/.cache/nemo-upcycle`.

    Args:
        variables: environment variables.
    """
    return Path(variables.get(CACHE_VARIABLE) or "~/.cache/nemo-upcycle").expanduser()


def writable_cache(kind: str) -> Path:
    """Return the cache folder for one kind of data (`assets`, `dense`, ...); create the folder if it is missing.

    Raises:
        UpcycleError: the folder cannot be written.
    """
    folder = cache_folder() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UpcycleError(
            f"Cache {folder}",
            kind="state",
            got=f"cannot be written: {error.strerror}",
            fix=f"set {CACHE_VARIABLE} to another folder",
        ) from None
    return folder
