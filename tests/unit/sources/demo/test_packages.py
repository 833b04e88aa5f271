"""Texts from packages: which files count, and the error if apt does not know a package."""

from __future__ import annotations

import gzip
from pathlib import Path
from shutil import which

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.demo.packages import _documents, package_texts


def test_manuals_and_dictionaries_are_read(tmp_path: Path) -> None:
    (tmp_path / "doc").mkdir()
    (tmp_path / "doc/index.txt").write_text("Manual")
    (tmp_path / "doc/link.txt").symlink_to("index.txt")
    (tmp_path / "doc/page.html").write_text("<p>")
    articles = [f"word{number}\n  {'meaning ' * 100}" for number in range(12)]
    with gzip.open(tmp_path / "words.dict.dz", "wt") as handle:
        handle.write("\n".join(articles))
    found = dict(_documents(tmp_path))
    assert list(found) == ["doc/index.txt", "words.dict.dz/1", "words.dict.dz/2", "words.dict.dz/3"]
    assert "\n".join(text for name, text in found.items() if "dict" in name) == "\n".join(articles)
    assert found["words.dict.dz/2"].startswith("word5\n")


@pytest.mark.skipif(not which("apt-get"), reason="needs apt-get")
def test_unknown_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", str(tmp_path))
    with pytest.raises(
        UpcycleError, match=r"Package no-such-doc could not be downloaded \(apt-get: .*no-such-doc.* Correct the name"
    ):
        package_texts("no-such-doc")
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("name", ["--help", "../dict", "dict gcide", ""])
def test_what_is_no_name_never_reaches_apt(name: str) -> None:
    with pytest.raises(UpcycleError, match="expected a name like dict-gcide"):
        package_texts(name)
