"""Wheels that pip really downloads from a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from nemo_upcycle.demo import assets
from nemo_upcycle.demo.assets import Asset
from nemo_upcycle.utils.cache import CACHE_VARIABLE


class WheelHouse:
    """A folder that pip downloads from, and the assets that stand for the wheels in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        folder.mkdir()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())  # a list, separated by blanks
        monkeypatch.setenv(CACHE_VARIABLE, str(folder.parent / "cache"))

    def add(self, name: str, member: str, files: dict[str, bytes], kind: str = "corpus", **changed: str) -> Asset:
        """Build `name-1.0` holding `files`, and register the asset `name`; `changed` spoils its fields."""
        wheel = self.folder / f"{name}-1.0-py3-none-any.whl"
        info = f"{name}-1.0.dist-info"
        meta = {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, content in {**files, **meta}.items():
                archive.writestr(path, content)
        fields = {
            "kind": kind,
            "package": name,
            "version": "1.0",
            "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
            "member": member,
            "licence": "MIT",
            "description": f"the {name} asset",
            **changed,
        }
        asset = Asset(disk_bytes=wheel.stat().st_size * 2, **fields)
        self.monkeypatch.setitem(assets.ASSETS, name, asset)
        return asset


@pytest.fixture
def wheel_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WheelHouse:
    return WheelHouse(tmp_path / "wheels", monkeypatch)
