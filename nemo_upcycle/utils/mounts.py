"""Which file system a path lies on."""

from __future__ import annotations

from pathlib import Path

from nemo_upcycle.utils.files import resolved


def filesystem_type(path: Path) -> str | None:
    """Return the type of the file system that a path lies on, or would, such as `ext4` or `lustre`; None if unknown.

    Example:
        >>> filesystem_type(Path("/proc/self/new"))
        'proc'
    """
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return None
    target = resolved(path)
    found = [(len(point), kind) for _, point, kind, *_ in map(str.split, mounts) if target.is_relative_to(point)]
    return max(found)[1] if found else None
