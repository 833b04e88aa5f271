"""pip keeps NVIDIA's packages unchanged. Stand-ins have the packages' names and releases."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
KEPT = {
    "torch",
    "megatron-core",
    "megatron-bridge",
    "transformers",
    "transformer-engine",
    "numpy",
    "filelock",
    "nemo-run",
}


def _metadata(name: str, release: str, lines: list[str]) -> str:
    return "\n".join(["Metadata-Version: 2.1", f"Name: {name}", f"Version: {release}", *lines, ""])


def _container(folder: Path, pins: Path) -> Path:
    """Make an environment with a container's package names and releases."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python3*/site-packages")
    for line in pins.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            package, _, release = line.partition("==")
            # NVIDIA overrides Megatron-Bridge's requirements. To meet the requirements, pip would replace packages.
            needs = ["Requires-Dist: not-in-the-container"] if package == "megatron-bridge" else []
            path = site / f"{package.replace('-', '_')}-{release}.dist-info" / "METADATA"
            path.parent.mkdir()
            path.write_text(_metadata(package, release, needs), encoding="utf-8")
    return folder


def _wheel(folder: Path, name: str, release: str, lines: list[str]) -> None:
    """Write a wheel that has only metadata."""
    stem = f"{name.replace('-', '_')}-{release}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{stem}.dist-info/METADATA", _metadata(name, release, lines))
        wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package index with this package and this environment's packages, whose releases differ from a container's."""
    tomllib = pytest.importorskip("tomllib", reason="of Python 3.11")
    folder = tmp_path_factory.mktemp("index")
    for one in distributions():
        needs = [f"Requires-Dist: {line}" for line in one.requires or []]
        if one.name != "nemo-upcycle":
            _wheel(folder, one.name, one.version, needs)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needs = [f"Requires-Dist: {line}" for line in project["dependencies"]]
    for extra, lines in project["optional-dependencies"].items():
        needs += [f"Provides-Extra: {extra}", *(f'Requires-Dist: {line}; extra == "{extra}"' for line in lines)]
    _wheel(folder, "nemo-upcycle", "1.0", needs)
    return folder


def _installed(index: Path, environment: Path, *arguments: str | Path) -> set[str]:
    """Return the names of the packages that pip would install or replace."""
    pip = [sys.executable, "-m", "pip", "--isolated", "--python", environment / "bin/python", "install", "--quiet"]
    where = ["--dry-run", "--no-index", "--find-links", index, "--report", "-"]
    done = subprocess.run([*pip, *where, *arguments], check=True, capture_output=True, text=True)
    return {one["metadata"]["name"].lower().replace("_", "-") for one in json.loads(done.stdout)["install"]}


@pytest.mark.slow
@pytest.mark.parametrize("container", ["26.08", "26.10"])
def test_a_container_keeps_its_packages(index: Path, tmp_path: Path, container: str) -> None:
    pins = ROOT / f"tests/unit/containers/{container}.txt"
    environment = _container(tmp_path / "venv", pins)
    added = _installed(index, environment, "nemo-upcycle[bridge,eval,demo]")
    assert {"nemo-upcycle", "lm-eval", "gguf"} <= added
    assert not added & KEPT
    assert "lm-eval" in _installed(index, environment, "--constraint", pins, "nemo-upcycle[eval,demo]")
