"""The small dense model of the data tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.models import write_llama, write_tokenizer


@pytest.fixture(scope="session")
def tiny_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a byte-level tokenizer, shared by all tests; do not modify."""
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense") / "tiny", vocab_size=259))
