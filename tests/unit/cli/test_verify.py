"""`verify`: its answers, and the input errors that it finds before the long comparison."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from tests.unit.cli.conftest import Command, refused


@pytest.fixture(scope="module")
def moe(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    with open_dense(dense) as source:
        return str(convert(source, tmp_path_factory.mktemp("moe") / "moe", UpcycleSpec(num_experts=4)).output)


def test_models_are_compared_by_weights_and_by_logits(dense: Path, moe: str, command: Command) -> None:
    found = command.values("verify", str(dense), moe, "--layers")
    assert found["equal"] is found["weights_exact"] is True
    assert found["logits"]["relative"] < 1e-6
    text = command.text("verify", str(dense), moe, "--layers")
    assert "difference after embedding " in text
    assert text.endswith("equal: yes")


def test_a_damaged_tokenizer_is_told(dense: Path, moe: str, tmp_path: Path) -> None:
    copy = shutil.copytree(dense, tmp_path / "dense")
    (copy / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    assert refused("verify", str(copy), moe).subject == f"{copy}/tokenizer.json"
