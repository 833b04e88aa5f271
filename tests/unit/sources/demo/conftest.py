"""Wheels that pip really downloads, from a local folder."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nemo_upcycle.sources.demo import assets
from nemo_upcycle.sources.demo.assets import Asset
from nemo_upcycle.utils.cache import CACHE_VARIABLE


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder from which pip downloads, beside an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())  # pip splits the value at blanks, and a URI has no blanks
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return folder


@pytest.fixture
def add_wheel(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asset]:
    """Build wheel `name-1.0`, and register its file or folder `member` as asset `name`; `changed` replaces fields."""

    def add(name: str, member: str, **changed: str) -> Asset:
        wheel, info = wheels / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
        files = {
            **{"pkg/data/a.txt": "alpha", "pkg/data/sub/b.txt": "beta", "pkg/__init__.py": "raise RuntimeError"},
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        }
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        fields = {"kind": "corpus", "package": name, "version": "1.0", "member": member, "licence": "MIT"}
        fields |= {"wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(), "description": f"the {name} asset"}
        asset = Asset(disk_bytes=wheel.stat().st_size * 2, **(fields | changed))
        monkeypatch.setitem(assets.ASSETS, name, asset)
        return asset

    return add
