"""What several test modules need of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import write_llama


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """Megatron's groups for this process alone; modules ask for it with `pytestmark`."""
    from nemo_upcycle.cpu.one_rank import one_rank

    with one_rank():
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of two layers, which nobody may change."""
    return write_llama(tmp_path_factory.mktemp("dense"), layers=2)
