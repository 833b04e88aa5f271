"""The machine and the software versions on which a report is made."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nemo_upcycle
from nemo_upcycle.package_info import __version__


_PACKAGES = (
    "torch",
    "nemo_toolkit",
    "megatron-bridge",
    "megatron-core",
    "transformer-engine",
    "lightning",
    "transformers",
    "lm_eval",
    "nemo_run",
)


def describe_environment() -> dict[str, Any]:
    """Collect versions, processor, cores, memory, GPUs and the package's commit as plain values."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "versions": {"nemo_upcycle": __version__, "python": platform.python_version(), **_versions()},
        "commit": package_commit(Path(nemo_upcycle.__file__).parent),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "gpus": _gpus(),
    }


def package_commit(folder: Path) -> str | None:
    """Return the git commit of the package's source, with `-dirty` if files were changed; None outside git.

    An installed package may be inside another repository, so git must track the package's own `__init__.py`.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(folder, "rev-parse", "--short=12", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", ".")
    return f"{commit}-dirty" if commit and changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _gpus() -> list[str]:
    try:
        from torch import cuda
    except ImportError:  # a report needs torch only for the GPUs' names
        return []
    return [cuda.get_device_name(number) for number in range(cuda.device_count())]


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
