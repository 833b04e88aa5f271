"""Start a module of this package as a process, from any current folder."""

from __future__ import annotations

from collections.abc import Sequence


#: `python -m` and `python -c` import from the current folder first. `-P` prevents this only from Python 3.11 on.
_START = (
    "import sys; sys.path = [place for place in sys.path if place]; del sys.argv[0]; "
    "import runpy; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def away_from_here(command: Sequence[str]) -> list[str]:
    """Return `python -m MODULE ...` as a command that does not look for the module in the current folder.

    Without this change, Python in the folder of another clone runs that clone's package in this environment.

    Args:
        command: command to change; any command other than `python -m` is returned unchanged.

    Example:
        >>> away_from_here(["python", "-m", "json.tool", "a.json"])[3:]
        ['json.tool', 'a.json']
    """
    python, *rest = command
    return [python, "-c", _START, *rest[1:]] if rest[:1] == ["-m"] else list(command)
