"""A dense folder to convert, and what compares the results."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import Conversion, convert
from tests.models import write_llama, write_tokenizer


COPY = {"num_experts": 4, "top_k": 2}
FINE = {"num_experts": 8, "top_k": 4, "granularity": 2}
SPEC = UpcycleSpec(**COPY)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(write_llama(tmp_path_factory.mktemp("dense"), vocab_size=259, shards=3))


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    """A dense folder that the test may spoil."""
    return Path(shutil.copytree(dense, tmp_path / "copy"))


def _convert(folder: Path, output: Path, spec: UpcycleSpec = SPEC, **options: Any) -> Conversion:
    with open_dense(folder) as source:
        return convert(source, output, spec, **options)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def _same_bits(a: Path, b: Path) -> None:
    one, other = _tensors(a), _tensors(b)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
