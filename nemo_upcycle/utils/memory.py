"""Ask the system how much memory programs can still use."""

from __future__ import annotations

import os
import re
from pathlib import Path


def free_memory_bytes() -> int | None:
    """Return the memory that is available to programs (bytes); None if the system does not report it."""
    try:
        found = re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        return int(found[1]) * 1024 if found else None
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
