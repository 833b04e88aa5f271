"""Grow a parent with experts in Megatron-Bridge. The result has the same bits as in `convert` and in NeMo."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.models.growth import growth_spec
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.utils.files import read_json
from tests.bridge.runs import VOCABULARY, ends_as_converted
from tests.parents import write_mixtral, write_moe, write_qwen3_moe


#: Expert-selection biases are not weights: a learning rate of zero would not stop them from moving.
STAYS: dict[str, Any] = {"model": {"moe_router_bias_update_rate": 0.0}}
WRITE: dict[str, Callable[[Path], Path]] = {
    "Mixtral": partial(write_mixtral, vocab_size=VOCABULARY),
    "Qwen3-MoE": partial(write_qwen3_moe, vocab_size=VOCABULARY, mlp_only_layers=[0], norm_topk_prob=False),
    "Qwen2-MoE": partial(write_moe, kind="Qwen2Moe", vocab_size=VOCABULARY),
    "Glm4-MoE": partial(write_moe, kind="Glm4Moe", vocab_size=VOCABULARY),
}


MIXED = {"tp": 2, "ep": 2, "etp": 1}
#: One layout for each parent, and two further layouts for a parent with a dense layer.
CASES = [*((name, MIXED) for name in WRITE), ("Qwen3-MoE", {"ep": 4}), ("Qwen3-MoE", {"pp": 2})]


@pytest.fixture(scope="module")
def parent(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent with four experts, two per token."""
    return WRITE[request.param](tmp_path_factory.mktemp("parent") / "dense")


@pytest.mark.parametrize(("parent", "layout"), CASES, indirect=["parent"], ids=str)
def test_the_checkpoint_has_the_bits_of_an_offline_conversion(
    parent: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    fields = growth_spec(read_architecture(parent), 8).to_dict() | {"router_std": 0.02, "method": "drop"}
    assert ends_as_converted(parent, tmp_path / "run", fields, **(STAYS | layout))
    assert read_architecture(tmp_path / "run-exported").num_experts == 8
    receipt = read_json(tmp_path / "run/receipt.json")
    assert (receipt["parent_experts"], receipt["spec"]) == (4, UpcycleSpec(**fields).to_dict())


@pytest.mark.parametrize("parent", WRITE, indirect=True)
def test_the_baseline_is_the_parent_as_it_is(parent: Path, tmp_path: Path) -> None:
    assert ends_as_converted(parent, tmp_path / "run", None, ep=2, **STAYS)
    assert read_json(tmp_path / "run/receipt.json")["exact"] is True
