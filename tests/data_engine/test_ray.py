"""The tasks on a real Ray cluster of this machine, where there is Ray: `.venv-data/bin/pip install ray`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


pytest.importorskip("datatrove")
pytest.importorskip("ray")

from tests.data_engine.blend import same_as_here


pytestmark = pytest.mark.slow
_CLUSTER = """
import sys
import ray

print(ray.init(num_cpus=2, include_dashboard=False, _temp_dir=sys.argv[1]).address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A cluster of its own, which ends with the process that started it."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # otherwise each cluster has a secret of its own
    with TemporaryDirectory(prefix="ray-") as folder:  # pytest's own is too long a name for a socket
        command = [sys.executable, "-c", _CLUSTER, folder]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin
            assert process.stdout
            yield process.stdout.readline().strip()
            process.stdin.close()


def test_same_bytes_as_on_one_machine(tmp_path: Path, address: str) -> None:
    same_as_here(tmp_path, "--ray", "--workers", "2", RAY_ADDRESS=address)
