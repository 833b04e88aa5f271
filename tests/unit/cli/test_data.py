"""`nemo-upcycle data` on the command line: overrides may come before or after options."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.conftest import refused


@pytest.mark.parametrize(
    "words", [["seq_length=1", "--check"], ["--check", "seq_length=1", "--strict"], ["--check", "--", "seq_length=1"]]
)
def test_overrides_stand_before_and_after_options(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text("sources: {mine: {train: ['one.txt']}}\n")
    error = refused("data", str(tmp_path / "mine.yaml"), str(tmp_path / "made"), *words)
    assert (error.subject.rpartition(" ")[2], error.got) == ("seq_length", 1)


@pytest.mark.parametrize("words", [["--check"], ["--workers", "2", "--strict"]])
def test_dir_may_follow_an_option(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "mine.yaml").write_text("sources: {mine: {train: ['one.txt']}}\n")
    error = refused("data", str(tmp_path / "mine.yaml"), *words, str(tmp_path / "made"), "seq_length=1")
    assert (error.subject.rpartition(" ")[2], error.got) == ("seq_length", 1)


def test_names_missing_texts_and_patterns_without_quotes(tmp_path: Path) -> None:
    missing = str(tmp_path / "nosuch.jsonl")
    assert str(refused("data", missing, str(tmp_path / "made"))).startswith(f"No file or folder of texts {missing}.")
    names = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    for name in names:
        Path(name).touch()
    error = str(refused("data", *names, str(tmp_path / "made"), "tokenizer=mine"))
    assert error.startswith("Texts are 2 files or folders")
    assert error.endswith("Write the pattern in quotes, or name a folder.")
