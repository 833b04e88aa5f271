"""Fixtures for `nemo-upcycle` on the command line: run a command, read its answer, expect a refusal."""

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
    """A small two-layer Llama with a tokenizer, shared by the tests of a module; do not modify."""
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, layers=2))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Serve a hub with a model, a gated copy of the model, and texts; yield the hub's folder and address."""
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
    """Runs `nemo-upcycle` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self, *words: str, status: int = 0) -> str:
        """Return the text answer, with all whitespace collapsed to single blanks."""
        assert main(words) == status
        return " ".join(self._capsys.readouterr().out.split())

    def values(self, *words: str, status: int = 0) -> dict[str, Any]:
        """Return the JSON answer."""
        assert main([*words, "--json"]) == status
        return dict(json.loads(self._capsys.readouterr().out))


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def refused(*words: str) -> UpcycleError:
    """Run a command that must be refused, and return the error with its fields named as on the command line."""
    with pytest.raises(UpcycleError) as caught:
        _run(list(words))
    return caught.value


def write_config(folder: Path, **changes: Any) -> str:
    """Write the `config.json` of Llama 3 8B with some settings changed, and return its folder."""
    folder.joinpath("config.json").write_text(json.dumps(LLAMA3_8B | changes))
    return str(folder)
