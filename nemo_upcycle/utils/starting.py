"""Start a module of this package as a process, from wherever the user stands."""

from __future__ import annotations

from collections.abc import Sequence


#: `python -m` and `python -c` look into the current folder first. `-P` would forbid it, from Python 3.11 on.
_START = (
    "import sys; sys.path = [place for place in sys.path if place]; del sys.argv[0]; "
    "import runpy; runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def away_from_here(command: Sequence[str]) -> list[str]:
    """Return `python -m MODULE ...` as a command that does not look for the module in the current folder.

    Who stands in another clone would run that clone's package, in the environment of this one.

    Args:
        command: a command; one that is not `python -m` is returned as it is.

    Example:
        >>> away_from_here(["python", "-m", "json.tool", "a.json"])[3:]
        ['json.tool', 'a.json']
    """
    python, *rest = command
    return [python, "-c", _START, *rest[1:]] if rest[:1] == ["-m"] else list(command)
