"""What a package's metadata require, read with the standard library alone: `doctor` runs where nothing else does.

It knows what this package's own metadata use: names, extras, the bounds >=, < and ==, and no markers but extras.
"""

from __future__ import annotations

import re
from typing import NamedTuple


_LINE = re.compile(r"([\w.-]+?)(?:\[([\w,-]+)\])?((?:(?:>=|<|==)[\w.]+,?)*)(?:\s*;\s*extra == \"([\w-]+)\")?")
_BOUND = re.compile(r"(>=|<|==)([\w.]+)")
#: numbers, pre-release, whether it is a development release; a local part (+nv26.2) does not count
_VERSION = re.compile(r"(\d+(?:\.\d+)*)(?:(a|b|rc)(\d+))?(?:\.post\d+)?(\.?dev\d+)?")


class Requirement(NamedTuple):
    """A line of a package's metadata.

    Attributes:
        name: the package.
        extras: the package's, with commas between them.
        bounds: on its version, as pip writes them.
        extra: the one that the line belongs to; empty for what is always required.
    """

    name: str
    extras: str
    bounds: str
    extra: str

    @property
    def argument(self) -> str:
        """What pip takes to install it."""
        return self.name + (f"[{self.extras}]" if self.extras else "") + self.bounds

    def allows(self, version: str) -> bool:
        """Return whether a version is within the bounds, pre-releases too."""
        return all(_holds(version, operator, bound) for operator, bound in _BOUND.findall(self.bounds))


def requirement(line: str) -> Requirement:
    """Return a line of metadata, taken apart.

    Raises:
        ValueError: it is written in a way that this package does not use.

    Example:
        >>> requirement('nemo-toolkit[lightning]<3,>=2.7; extra == "nemo"').argument
        'nemo-toolkit[lightning]<3,>=2.7'
    """
    if not (match := _LINE.fullmatch(line)):
        raise ValueError(f"requirement {line!r}: not understood")
    return Requirement(*(match[number] or "" for number in (1, 2, 3, 4)))


def _holds(version: str, operator: str, bound: str) -> bool:
    own, limit = _key(version), _key(bound)
    if operator == ">=":
        return own >= limit
    # by PEP 440, a pre-release of 0.16 is not below 0.16
    return own == limit if operator == "==" else own < limit and own[0] != limit[0]


def _key(version: str) -> tuple[tuple[int, ...], tuple[str, int], bool]:
    """Make the key that orders versions."""
    match = _VERSION.match(version)
    if not match:
        return (), ("", 0), False  # before every other
    numbers = tuple(map(int, re.sub(r"(\.0+)+$", "", match[1]).split(".")))
    # a development release comes before the pre-releases, and these before the release itself
    stage = match[2] or ("" if match[4] else "z")
    return numbers, (stage, int(match[3] or 0)), not match[4]
