"""Processes that run a module of this package."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.starting import away_from_here


def test_a_process_is_of_its_installed_clone(tmp_path: Path) -> None:
    (tmp_path / "nemo_upcycle").mkdir()
    (tmp_path / "nemo_upcycle/__init__.py").write_text("raise SystemExit('of another clone')\n")
    (tmp_path / "runpy.py").write_text("raise SystemExit('of the current folder')\n")
    command = away_from_here([sys.executable, "-m", "nemo_upcycle.cli", "--version"])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == (f"nemo-upcycle {__version__}", "")
