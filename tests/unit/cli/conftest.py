"""The command as it is typed: what it answers, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli.main import _run, main
from nemo_upcycle.errors import UpcycleError
from tests.model_hub import serving
from tests.models import LLAMA3_8B, write_llama, write_tokenizer


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of two layers with a tokenizer, which nobody may change."""
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, layers=2))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A hub with a model, the same behind its terms, and texts: what it serves, and its address."""
    root = tmp_path_factory.mktemp("hub")
    for name in ("tiny", "gated"):
        dense = write_tokenizer(write_llama(root / f"acme/{name}", vocab_size=259, layers=1, shards=2))
        (dense / "original").mkdir()
        (dense / "original/model.safetensors").write_bytes(b"not ours")
    (root / "acme/texts").mkdir()
    for name in ("first", "second"):
        (root / f"acme/texts/{name}.jsonl").write_text(json.dumps({"text": name * 100}) + "\n")
    with serving(root) as endpoint:
        yield root, endpoint


class Command:
    """`nemo-upcycle`, typed in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self, *words: str, status: int = 0) -> str:
        """Give the answer for people, blanks and line ends as one blank."""
        assert main(words) == status
        return " ".join(self._capsys.readouterr().out.split())

    def values(self, *words: str, status: int = 0) -> dict[str, Any]:
        """Give the answer for machines."""
        assert main([*words, "--json"]) == status
        return dict(json.loads(self._capsys.readouterr().out))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def refused(*words: str) -> UpcycleError:
    """Type what has to be refused; give the error, its fields called as they are typed."""
    with pytest.raises(UpcycleError) as caught:
        _run(list(words))
    return caught.value


def write_config(folder: Path, **changes: Any) -> str:
    """Write the `config.json` of Llama 3 8B, with changes."""
    folder.joinpath("config.json").write_text(json.dumps(LLAMA3_8B | changes))
    return str(folder)
