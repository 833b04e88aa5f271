"""A parent, and texts in formats that this environment can read without further packages."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import pytest

from nemo_upcycle.data.environment import VARIABLE
from tests.models import write_llama, write_tokenizer


@pytest.fixture(scope="session")
def parent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with a tokenizer, shared by all tests; do not modify."""
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("models") / "My.Llama", vocab_size=259, layers=2))


@pytest.fixture
def texts_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty documents: 20 plain, 20 compressed, and 20 rows of Parquet with the text in column `body`."""
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv(VARIABLE, sys.executable)
    folder, texts = tmp_path / "texts", [f"{number} words " * 60 for number in range(60)]
    (folder / "more").mkdir(parents=True)
    for number, text in enumerate(texts[:20]):
        (folder / f"{number:02}.txt").write_text(text)
        (folder / f"more/{number:02}.txt.gz").write_bytes(gzip.compress(texts[20 + number].encode()))
    table = pyarrow.table({"body": texts[40:], "url": ["u"] * 20})
    pyarrow.parquet.write_table(table, tmp_path / "body.parquet")
    return folder
