"""`verify`: what is wrong with the input shows before the long work, and what is missing has a command for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.cli.main import main
from nemo_upcycle.convert.offline import convert
from tests.models import write_llama, write_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("verify")
    dense = write_tokenizer(write_llama(folder / "dense", vocab_size=259, layers=1))
    with open_dense(dense) as source:
        convert(source, folder / "moe", UpcycleSpec(num_experts=2, top_k=2))
    return str(dense), str(folder / "moe")


def test_a_wrong_text_shows_before_weights_are_compared(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_late(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("nemo_upcycle.verify.verification.compare_weights", too_late)
    assert main(["verify", *folders, "--text", "/absent"]) == 2
    assert "/absent" in capsys.readouterr().err


def test_a_damaged_tokenizer_is_told(
    folders: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    for path in Path(folders[0]).iterdir():
        (dense / path.name).write_bytes(path.read_bytes())
    (dense / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    assert main(["verify", str(dense), folders[1]]) == 2
    assert f"{dense}: tokenizer: got " in capsys.readouterr().err
