"""The number of the form in which runs are noted: in receipts, markers of stages, plans and manifests of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.validation import is_whole


#: Raised when earlier releases could not read what is written; a further field does not raise it.
SCHEMA = 1
KEY = "schema"


def numbered(content: Mapping[str, Any]) -> dict[str, Any]:
    """Put the number in front of what is written.

    Example:
        >>> numbered({"stage": "import"})
        {'schema': 1, 'stage': 'import'}
    """
    return {KEY: SCHEMA, **content}


def require_known(content: object, path: object) -> int:
    """Check that this release can read what was written; return its number.

    Args:
        content: what was read.
        path: the file.

    Raises:
        UpcycleError: a newer release wrote it.
    """
    found = content.get(KEY, 0) if isinstance(content, Mapping) else 0
    if not is_whole(found, 0, SCHEMA):
        raise UpcycleError(
            f"schema of {path}",
            got=found,
            expected=f"{SCHEMA} or less, which this release reads",
            fix="go on with the release that wrote it, or a newer one",
        )
    return int(found)
