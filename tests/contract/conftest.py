"""Fixtures that several files share in one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.functional.tiny import prepare


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent whose vocabulary two ranks can share, and its tokenised texts."""
    return prepare(tmp_path_factory.mktemp("inputs"), vocab_size=260)
