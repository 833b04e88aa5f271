"""A finished data folder is reused only for the inputs that it was made from, and changed input files are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend import Blend, BlendConfig, SourceConfig
from nemo_upcycle.data.build import MADE_FROM, _require_ours, build_blend, changed_files
from nemo_upcycle.data.engine.tasks import BEGUN
from nemo_upcycle.data.finished import BUILD, FORMAT
from nemo_upcycle.data.manifest import texts_of
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MARKER, MODEL_MARKER, write_json


def test_settings_of_later_releases_count_as_defaults(tmp_path: Path) -> None:
    config = BlendConfig({"talks": SourceConfig(["talks/*.txt"])}, seed=7)
    noted = {"format": FORMAT, "blend": texts_of(config), "strict": False}
    del noted["blend"]["pii"], noted["blend"]["sources"]["talks"]["on_hit"]
    write_json(tmp_path / MARKER, {"made_from": noted})
    now = {"format": FORMAT, "blend": texts_of(config), "strict": False}
    _require_ours(tmp_path, now)
    config.pii = ["email"]
    with pytest.raises(UpcycleError, match=r"holds another blend \(pii differ\)"):
        _require_ours(tmp_path, now | {"blend": texts_of(config)})


def test_refuses_a_stopped_build_with_other_settings(tmp_path: Path) -> None:
    config = BlendConfig({name: SourceConfig([f"{name}/*.txt"]) for name in ("talks", "books")})
    begun = {"format": FORMAT, "blend": texts_of(config), "strict": False}
    write_json(tmp_path / BUILD / MADE_FROM, begun)
    del config.sources["books"]
    now = begun | {"blend": texts_of(config)}
    _require_ours(tmp_path, now)
    (tmp_path / BUILD / BEGUN).touch()
    _require_ours(tmp_path, begun)
    with pytest.raises(UpcycleError) as caught:
        _require_ours(tmp_path, now)
    assert caught.value.got == "holds another blend (sources differ)"
    assert "use the settings of that blend" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "marker"), [("notes.json", {}), (MARKER, {}), (MARKER, {"made_from": {"chat": {}}}), (MODEL_MARKER, {})]
)
def test_a_folder_that_is_refused_stays_as_it_is(tmp_path: Path, name: str, marker: dict[str, Any]) -> None:
    """The folder belongs to somebody else, to a stage, to a build of conversations, or to a model."""
    write_json(tmp_path / name, marker)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UpcycleError) as caught:
        build_blend(Blend("mine", tmp_path, BlendConfig({}, tokenizer="parent")), tmp_path)
    assert caught.value.got == "holds files that are not a blend"
    assert sorted(tmp_path.iterdir()) == before


@pytest.fixture
def blend(tmp_path: Path) -> Blend:
    """A blend of two local files and one remote file, with its finished folder beside them."""
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    stats = {str(path): path.stat() for path in tmp_path.glob("*.txt")}
    files = {path: {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns} for path, stat in stats.items()}
    far = {"s3://shelf/c.txt": {"bytes": 3}}
    write_json(tmp_path / "data/manifest.json", {"sources": {"mine": {"files": files}, "far": {"files": far}}})
    sources = {"mine": SourceConfig(train=["*.txt"]), "far": SourceConfig(train=["s3://shelf/*.txt"])}
    return Blend("mine", tmp_path, BlendConfig(sources))


CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, list[str]]]] = {
    "a file more": (lambda folder: (folder / "added.txt").touch(), {"new": ["added.txt"]}),
    "a file less": (lambda folder: (folder / "a.txt").unlink(), {"gone": ["a.txt"]}),
    "another size": (lambda folder: (folder / "b.txt").write_text("longer than it was"), {"changed": ["b.txt"]}),
    "another time": (lambda folder: os.utime(folder / "b.txt", ns=(5, 5)), {"changed": ["b.txt"]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_files_that_are_others_are_named(blend: Blend, tmp_path: Path, change: str) -> None:
    act, expected = CHANGES[change]
    assert changed_files(blend, tmp_path / "data") == {}
    act(tmp_path)
    wanted = {how: [str(tmp_path / name) for name in names] for how, names in expected.items()}
    assert changed_files(blend, tmp_path / "data") == wanted


def test_texts_that_are_all_gone_are_named_by_their_pattern(blend: Blend, tmp_path: Path) -> None:
    for path in tmp_path.glob("*.txt"):
        path.unlink()
    assert changed_files(blend, tmp_path / "data") == {"gone": ["Pattern *.txt"]}


def test_folder_of_an_earlier_version_is_not_compared(blend: Blend, tmp_path: Path) -> None:
    files = {str(tmp_path / "a.txt"): {"bytes": 3}}
    write_json(tmp_path / "data/manifest.json", {"sources": {"mine": {"files": files}}})
    assert changed_files(blend, tmp_path / "data") == {}
