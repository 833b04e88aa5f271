"""Corpora that are prepared on first use: one folder for each content."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.data.module import corpus_data
from tests.functional.tiny import write_corpus


def test_a_corpus_of_the_same_name_is_another_corpus(
    tiny_dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEMO_UPCYCLE_CACHE", str(tmp_path / "cache"))
    corpora = [write_corpus(tmp_path / name, words=words) for name, words in (("a", 600), ("b", 900))]

    def paths(corpus: Path) -> str:
        return str(corpus_data(str(tiny_dense), str(corpus), seq_length=16).index_mapping_dir)

    first, longer = (paths(corpus) for corpus in corpora)
    assert first != longer
    assert paths(corpora[0]) == first
