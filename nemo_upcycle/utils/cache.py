"""The folder in which models, blends and texts that were fetched or made are kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError


CACHE_VARIABLE = "NEMO_UPCYCLE_CACHE"


def cache_folder(variables: Mapping[str, Any] = os.environ) -> Path:
    """Return the folder of what is fetched or made once: `$NEMO_UPCYCLE_CACHE`, or `~/.cache/nemo-upcycle`.

    Args:
        variables: the environment in which it is looked for.
    """
    return Path(variables.get(CACHE_VARIABLE) or "~/.cache/nemo-upcycle").expanduser()


def writable_cache(kind: str) -> Path:
    """Return the cache's folder for data of one kind (`assets`, `dense`, ...), created if missing.

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
