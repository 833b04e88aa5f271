"""Read what is installed, and which releases fit, with the standard library alone: `doctor` may have nothing else.

It knows what this package's own metadata use: names, extras, the bounds >=, < and ==, and no markers but extras.
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

    def is_below(self, version: str) -> bool:
        """Return whether a version is beyond the upper bound, and beyond no other."""
        return not self.allows(version) and all(
            operator == "<" or _holds(version, operator, bound) for operator, bound in _BOUND.findall(self.bounds)
        )


def installed_release(package: str) -> str | None:
    """Return the release of a package that Python would import; None if it is not installed."""
    # In NVIDIA's containers these are folders of sources, which some users replace: the metadata may be older.
    is_replaced = package in ("megatron-core", "megatron-bridge")
    if is_replaced and (sources := value_in(package.replace("-", "."), "package_info.py", "__version__")):
        return str(sources)
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def value_in(package: str, file: str, name: str) -> Any:
    """Return a value of a plain file of a package, without the slow import of the package; None without that file."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # without the package that this one is in
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, file)).is_file():
            return runpy.run_path(str(path)).get(name)
    return None


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
