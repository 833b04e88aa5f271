"""Print the packages of this environment that are newer than in the lock: python newer_releases.py CONSTRAINTS."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version


for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines():
    if line.startswith("#"):
        continue
    locked = Requirement(line)
    if locked.marker and not locked.marker.evaluate():
        continue
    try:
        installed = version(locked.name)
    except PackageNotFoundError:
        continue
    pinned = str(locked.specifier).removeprefix("==")
    if Version(installed) > Version(pinned):
        sys.stdout.write(f"  {locked.name} {pinned} is locked; {installed} is newer\n")
