"""Read installed releases and check them against requirements, with the standard library only.

`doctor` must work if nothing else is installed. Only the syntax of this package's own metadata is supported: names,
extras, the bounds >=, < and ==, and extras as the only markers.
"""

from __future__ import annotations

import importlib.util
import re
import runpy
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple


_LINE = re.compile(r"([\w.-]+?)(?:\[([\w,-]+)\])?((?:(?:>=|<|==)[\w.]+,?)*)(?:\s*;\s*extra == \"([\w-]+)\")?")
_BOUND = re.compile(r"(>=|<|==)([\w.]+)")
#: Groups: numbers, kind and number of a pre-release, mark of a development release. A local part (+nv26.2) is ignored.
_VERSION = re.compile(r"(\d+(?:\.\d+)*)(?:(a|b|rc)(\d+))?(?:\.post\d+)?(\.?dev\d+)?")


class Requirement(NamedTuple):
    """One requirement (a line of a package's metadata).

    Attributes:
        name: required package.
        extras: extras of the required package, separated by commas.
        bounds: bounds of its version, in pip's syntax.
        extra: extra that the line belongs to; empty if the package is always required.
    """

    name: str
    extras: str
    bounds: str
    extra: str

    @property
    def argument(self) -> str:
        """The requirement as an argument of `pip install`."""
        return self.name + (f"[{self.extras}]" if self.extras else "") + self.bounds

    def allows(self, version: str) -> bool:
        """Return whether a version (pre-releases included) is within the bounds."""
        return all(_holds(version, operator, bound) for operator, bound in _BOUND.findall(self.bounds))

    def is_below(self, version: str) -> bool:
        """Return whether a version violates the upper bound and no other bound."""
        return not self.allows(version) and all(
            operator == "<" or _holds(version, operator, bound) for operator, bound in _BOUND.findall(self.bounds)
        )


def installed_release(package: str) -> str | None:
    """Return the release of a package that Python would import; None if it is not installed."""
    # NVIDIA's containers hold these packages as source folders. Users replace these folders, so the metadata may be
    # outdated.
    is_replaced = package in ("megatron-core", "megatron-bridge")
    if is_replaced and (sources := value_in(package.replace("-", "."), "package_info.py", "__version__")):
        return str(sources)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def value_in(package: str, file: str, name: str) -> Any:
    """Return a value from one file of a package without the package's slow import; None if the file is missing."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # the parent package is not installed
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, file)).is_file():
            return runpy.run_path(str(path)).get(name)
    return None


def requirement(line: str) -> Requirement:
    """Parse a line of a package's metadata.

    Raises:
        ValueError: the line has syntax that this package does not use.

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
    # PEP 440: a pre-release of 0.16 does not satisfy <0.16
    return own == limit if operator == "==" else own < limit and own[0] != limit[0]


def _key(version: str) -> tuple[tuple[int, ...], tuple[str, int], bool]:
    """Return a sort key for a version."""
    match = _VERSION.match(version)
    if not match:
        return (), ("", 0), False  # sorts before every valid version
    numbers = tuple(map(int, re.sub(r"(\.0+)+$", "", match[1]).split(".")))
    # development release < pre-releases < release
    stage = match[2] or ("" if match[4] else "z")
    return numbers, (stage, int(match[3] or 0)), not match[4]
