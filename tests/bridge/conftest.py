"""Fixtures that several files share in one process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.bridge.runs import VOCABULARY
from tests.functional.tiny import write_finished_inputs
from tests.models import write_llama


#: Without Megatron-Bridge, no test is collected. `make test-in ENV=bridge` makes an environment with Megatron-Bridge.
collect_ignore_glob = [] if find_spec("megatron.bridge") else ["test_*.py"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tied Llama."""
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", tied=True, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent, its tokenised texts and a suite."""
    return write_finished_inputs(tmp_path_factory.mktemp("inputs"))
