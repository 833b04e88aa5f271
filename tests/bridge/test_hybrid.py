"""A HybridModel is upcycled like a GPTModel: bit-identical in every layout, with the same export."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.online.receipt import read_receipt
from tests.bridge.runs import SPEC, VOCABULARY, ends_as_converted, fill_twice, refusal, train_on_ranks
from tests.distributed.ranks import run_ranks
from tests.models import write_nemotron_h, write_qwen3


MIXED = SPEC | {"moe_layers": "every-2"}
SHARED: dict[str, Any] = {"num_experts": 8, "top_k": 4, "granularity": 2, "shared_experts": 1, "method": "noise"}


@pytest.mark.parametrize(
    ("pattern", "fields", "layout"),
    [
        ("*E*-*E*-", MIXED, {}),
        ("*E*E*E*E", SPEC, {"pp": 2}),
        ("*E*-*|E*-", MIXED, {"pp": 2}),
        ("*E*E*E*E", SHARED, {"tp": 2, "ep": 2, "etp": 1}),
        ("*E*E|*E*E", SPEC, {"tp": 2, "pp": 2, "ep": 2}),
        ("*E*E*E*E", SPEC, {"style": "builder", "ep": 2}),
        ("*|E*-*|E|*-", MIXED, {"style": "builder", "pp": 2, "vp": 2}),
    ],
    ids=str,
)
def test_the_checkpoint_has_the_bits_of_an_offline_conversion(
    dense: Path, tmp_path: Path, pattern: str, fields: dict[str, Any], layout: dict[str, Any]
) -> None:
    assert ends_as_converted(dense, tmp_path / "run", fields, pattern=pattern, **layout)


def test_the_dense_baseline_becomes_its_own_class_again(dense: Path, tmp_path: Path) -> None:
    assert ends_as_converted(dense, tmp_path / "run", None, pattern="*-*-|*-*-", pp=2)


def test_norms_of_query_and_key_are_filled(tmp_path: Path) -> None:
    """Megatron's own layers of a HybridModel lack the norms of query and key."""
    parent = write_qwen3(tmp_path / "dense", vocab_size=VOCABULARY)
    assert ends_as_converted(parent, tmp_path / "run", SPEC, pattern="*E*E*E*E", tp=2)


@pytest.mark.parametrize("fields", [SPEC, MIXED], ids=["all layers", "every second"])
def test_a_dense_hybrid_checkpoint_is_a_parent(dense: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    """Turn `*-` layers into `*E` layers. Megatron-Core's own loader refuses this change."""
    train_on_ranks(2, dense, tmp_path / "dense", pattern="*-*-*-*-", tp=2)
    parent = tmp_path / "dense/iter_0000001"
    (parent / "config.json").write_bytes((dense / "config.json").read_bytes())

    pattern = "*E*E*E*E" if fields is SPEC else "*E*-*E*-"
    assert ends_as_converted(dense, tmp_path / "run", fields, parent=parent, pattern=pattern, ep=2)


@pytest.mark.parametrize(
    ("pattern", "layout", "changes", "words"),
    [
        ("*E*E*E*E", {}, {"hybrid_layer_pattern": "*-*-*-*-"}, "got *-*-*-*-; expected *E*E*E*E"),
        ("*E*E*E*E", {}, {"hybrid_layer_pattern": "*E*E*E*-"}, "expected *E*E*E*E"),
        ("*E*E*E*E", {}, {"hybrid_layer_pattern": "**EE*E*E"}, " in turn"),
        ("*E*E*E*E", {}, {"hybrid_layer_pattern": "*EM*E*E*E"}, "position_embedding_type is rope; expected none, "),
        ("*E*E*E*E", {}, {"hybrid_layer_pattern": None}, "config.model.hybrid_layer_pattern is missing"),
        ("*E*E|*E*E", {}, {}, "hybrid_layer_pattern *E*E|*E*E has 2 segments"),
        ("*E*E*E*E", {}, {"also_save_hf_checkpoint": True}, "nemo-upcycle export"),
    ],
    ids=str,
)
def test_what_a_hybrid_model_cannot_be_is_refused_by_name(
    dense: Path, tmp_path: Path, pattern: str, layout: dict[str, int], changes: dict[str, Any], words: str
) -> None:
    changes = {f"{'checkpoint' if 'save' in name else 'model'}.{name}": value for name, value in changes.items()}
    assert words in refusal(dense, tmp_path, SPEC, changes, pattern=pattern, **layout)


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not in this environment")
@pytest.mark.parametrize(("pattern", "layout"), [("M-M*-M-*-", {"tp": 2}), ("M-M*|-M-*-", {"pp": 2})], ids=str)
def test_a_nemotron_h_is_filled_as_bridge_fills_it(tmp_path: Path, pattern: str, layout: dict[str, int]) -> None:
    """Compare before training, because Mamba's kernels need a GPU. `tests/te/test_mamba.py` has more such tests."""
    parent = write_nemotron_h(tmp_path / "dense")
    options = {"pattern": pattern, **layout}
    differing = run_ranks(fill_twice, 2, parent, tmp_path / "run", options)
    assert differing == [[], []]
    receipt = read_receipt(tmp_path / "run/receipt.json")
    assert receipt["exact"]
    assert {"decoder.layers.0.mixer.in_proj.weight"} < {record["name"] for record in receipt["parameters"]}
