"""`export`: what stands in a receipt is checked, and a mistake there is one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.cli import main
from nemo_upcycle.files import MARKER
from tests.models import write_llama
from tests.unit.test_export import SPEC, write_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    dense = write_llama(folder / "dense", layers=2)
    write_checkpoint(folder / "pretrain/ck", dense, SPEC)
    return folder


def _export(run: Path, output: Path, *words: str) -> int:
    return main(["export", str(run / "pretrain/ck"), str(output), "--dense", str(run / "dense"), *words])


@pytest.mark.parametrize(
    ("receipt", "said"),
    [
        ([1], "got no receipt"),
        ("text", "got no receipt"),
        ({"spec": [1]}, "got no receipt"),
        ({"spec": {"num_experts": 4, "new_field": 1}}, "unexpected keyword argument 'new_field'"),
        ({"spec": {"num_experts": 4, "noise_std": "much"}}, "noise_std: got much"),
        ({"spec": {"num_experts": "4"}}, "num_experts: got 4, expected a whole number"),
    ],
)
def test_a_receipt_that_is_none_is_told_in_one_message(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], receipt: Any, said: str
) -> None:
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    assert _export(run, tmp_path / "hf", "--receipt", str(tmp_path / "receipt.json")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert [path.name for path in tmp_path.iterdir()] == ["receipt.json"]


def test_a_stages_folder_is_not_replaced(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The pipeline marks its stages' folders, too."""
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage" / MARKER).write_text('{"stage": "evaluate"}')
    assert _export(run, tmp_path / "stage", "--experts", "4", "--top-k", "2") == 2
    assert "a finished folder that was not made by nemo-upcycle export" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "stage").iterdir()] == [MARKER]
    for _ in range(2):  # an earlier export is replaced
        assert _export(run, tmp_path / "hf", "--experts", "4", "--top-k", "2") == 0
