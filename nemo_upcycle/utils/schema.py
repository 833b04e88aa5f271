"""The schema number of the files that describe a run: receipts, stage markers, plans and data manifests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.validation import is_whole


#: The number increases only if earlier releases cannot read the files. An additional field does not increase the
#: number.
SCHEMA = 1
KEY = "schema"


def numbered(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content with the schema number as its first key.

    Example:
        >>> numbered({"stage": "import"})
        {'schema': 1, 'stage': 'import'}
    """
    return {KEY: SCHEMA, **content}


def require_known(content: object, path: object) -> int:
    """Check that this release can read a file, and return the file's schema number.

    Args:
        content: content of the file.
        path: the file, for errors.

    Raises:
        UpcycleError: a newer release wrote the file.
    """
    found = content.get(KEY, 0) if isinstance(content, Mapping) else 0
    if not is_whole(found, 0, SCHEMA):
        raise UpcycleError(
            f"schema of {path}",
            got=found,
            expected=f"{SCHEMA} or less, because this release cannot read newer files",
            fix="use the release that wrote the file, or a newer release",
        )
    return int(found)
