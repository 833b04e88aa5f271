"""The tasks on a real Ray cluster of this machine, where there is Ray: `.venv-data/bin/pip install ray`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


pytest.importorskip("datatrove")
pytest.importorskip("ray")

from tests.data_engine.blend import everything, run
from tests.data_engine.test_engine import blend


pytestmark = pytest.mark.slow
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def cluster() -> Iterator[None]:
    started = [RAY, "start", "--head", "--num-cpus", "2", "--include-dashboard", "false"]
    subprocess.run(started, check=True, capture_output=True)
    yield
    subprocess.run([RAY, "stop", "--force"], check=True, capture_output=True)


def test_same_bytes_as_on_one_machine(tmp_path: Path, cluster: None) -> None:
    plan = blend(tmp_path, finders=2)
    done = run(plan, "--ray", "--workers", "2")
    assert done.returncode == 0, done.stderr
    found = everything(plan.parent)
    shutil.rmtree(plan.parent)
    assert run(blend(tmp_path, finders=2)).returncode == 0
    assert everything(plan.parent) == found
