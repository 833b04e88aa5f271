"""Filling in blocks equals filling at once, and a bad value is named wherever it stands."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.online import upcycle
from tests.folders import SPEC, change_weights
from tests.models import build_chunks, moe_settings, weights_of
from tests.tiers import every_pair


pytestmark = pytest.mark.usefixtures("megatron")


def _filled(folder: Path, spec: UpcycleSpec, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    chunks = build_chunks(folder, params_dtype=dtype, **moe_settings(read_architecture(folder), spec))
    with open_dense(folder) as source:
        upcycle_into(chunks, source, spec)
    return dict(chunks[0].named_parameters())


SPECS = {
    "copy": SPEC,
    "granular and shared": UpcycleSpec(num_experts=8, top_k=4, granularity=2, shared_experts=1),
    "noise": UpcycleSpec(num_experts=4, top_k=2, method="noise", noise_std=0.1),
    "drop": UpcycleSpec(num_experts=4, top_k=2, method="drop", drop_ratio=0.5),
}


@pytest.mark.parametrize(
    ("spec", "dtype", "block_bytes"), every_pair(SPECS, (torch.float32, torch.bfloat16), (1, 300, 4096)), ids=str
)
def test_blocks_of_any_size_give_the_same_bits(
    dense: Path, spec: str, dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _filled(dense, SPECS[spec], dtype)
    monkeypatch.setattr(upcycle, "_BLOCK_BYTES", block_bytes)
    for name, parameter in _filled(dense, SPECS[spec], dtype).items():
        assert torch.equal(parameter, whole[name]), name


INFINITE, TOO_LARGE = "has NaN or infinite values (1)", "has numbers too large for float16"


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("model.embed_tokens.weight", float("-inf"), INFINITE),
        ("model.layers.0.self_attn.v_proj.weight", float("nan"), INFINITE),
        ("model.layers.0.mlp.down_proj.weight", 1e5, TOO_LARGE),
    ],
)
def test_one_number_that_the_model_cannot_hold_is_named(
    dense: Path, tmp_path: Path, name: str, value: float, got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcycle, "_BLOCK_BYTES", 300)
    tensor = weights_of(dense)[name]
    tensor[-1, -1] = value
    folder = change_weights(Path(shutil.copytree(dense, tmp_path / "dense")), {name: tensor})
    chunks = build_chunks(folder, num_experts=4, params_dtype=torch.float16 if got == TOO_LARGE else torch.float32)
    with open_dense(folder) as source, pytest.raises(CheckpointError) as refused:
        upcycle_into(chunks, source, SPEC)
    assert refused.value.subject.endswith(name)
    assert refused.value.got == got
