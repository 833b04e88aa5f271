"""A MiMo is a Qwen2 with the same weights; its layers for multi-token prediction are omitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.verification import verify
from nemo_upcycle.models.hf_model import load_model
from nemo_upcycle.utils.files import read_json
from tests.folders import converted
from tests.models import sample_tokens, write_qwen2, write_tokenizer
from tests.parents import write_mimo


SPEC = UpcycleSpec(num_experts=4, top_k=2)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A Qwen2, and a MiMo with the same weights."""
    return write_qwen2(tmp_path / "qwen2", layers=2), write_mimo(tmp_path / "mimo", layers=2)


def test_mimo_becomes_the_moe_of_the_same_qwen2(folders: tuple[Path, Path], tmp_path: Path) -> None:
    outputs = [tmp_path / f"{dense.name}-moe" for dense in folders]
    for dense, output in zip(folders, outputs, strict=True):
        assert converted(dense, output, SPEC).exact
    qwen2, mimo = ({file.name: file.read_bytes() for file in output.glob("*.safetensors")} for output in outputs)
    assert qwen2
    assert qwen2 == mimo
    assert "num_nextn_predict_layers" not in read_json(outputs[1] / "config.json")
    write_tokenizer(folders[1])
    assert verify(folders[1], outputs[1]).equal


def test_mimo_computes_what_the_same_qwen2_does(folders: tuple[Path, Path]) -> None:
    models = [load_model(folder, dtype=torch.float32).eval() for folder in folders]
    one, other = (model(sample_tokens(250)).logits for model in models)
    assert torch.equal(one, other)
