from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import write_llama, write_tokenizer


QUESTIONS = [
    {"question": "What is 1 + 1?", "choices": ["1", "2", "three", "10"], "answer": 1, "subject": "arithmetic"},
    {"question": "Which is a fruit?", "choices": ["stone", "pear", "iron", "sand"], "answer": 1, "subject": "botany"},
    {"question": "Which is wet?", "choices": ["fire", "ash", "dust", "rain"], "answer": 3, "subject": "weather_now"},
]
DOCUMENTS = [
    ("first", "The state of the union is measured here.\n\nIt is long enough to be cut into some windows of text."),
    ("second", "Another speech, with an é that takes two bytes."),
]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one torch thread: on a busy machine, threads that wait for each other make a tiny model much slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with random weights, large enough to give different answers."""
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    return write_tokenizer(write_llama(folder, layers=2, vocab_size=259, max_position_embeddings=512))
