"""Fixtures that several test modules of one process share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import write_llama


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """Set up Megatron's process groups for this single process; modules request this fixture with `pytestmark`."""
    from nemo_upcycle.cpu.one_rank import one_rank

    with one_rank():
        yield


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small two-layer Llama, shared by the tests of a module; do not modify."""
    return write_llama(tmp_path_factory.mktemp("dense"), layers=2)
