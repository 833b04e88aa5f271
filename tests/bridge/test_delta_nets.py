"""Qwen3.5 in Bridge: gated delta nets are filled with the bits of Bridge's own loader, saved, resumed and exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bridge.runs import SEQUENCE, VOCABULARY, differences, export, fill_twice, is_as_converted, train_on_ranks
from tests.distributed.ranks import run_ranks
from tests.loading.cases import logits
from tests.models import sample_tokens
from tests.parents import write_qwen35
from tests.tiers import quick


SPEC: dict[str, Any] = {"num_experts": 4, "top_k": 2}
LAYOUTS = [{}, {"tp": 2}, {"pp": 2}, {"ep": 2}, {"tp": 2, "ep": 2, "etp": 1}]


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen35(tmp_path_factory.mktemp("qwen35") / "dense", vocab_size=VOCABULARY)


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}], ids=str)
def test_all_but_networks_has_the_bits_of_bridges_own_loader(
    parent: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    assert run_ranks(fill_twice, 2, parent, tmp_path / "run", layout) == [[], []]


@pytest.mark.parametrize("layout", quick([(one,) for one in LAYOUTS], ({"tp": 2, "ep": 2, "etp": 1},)), ids=str)
def test_the_checkpoint_has_the_bits_of_an_offline_conversion(
    parent: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    ranks = max(layout.get("tp", 1) * layout.get("pp", 1), layout.get("ep", 1))
    train_on_ranks(ranks, parent, tmp_path / "run", SPEC, **layout)
    assert is_as_converted(parent, tmp_path / "run", SPEC)


def test_a_training_that_goes_on_has_the_bits_of_one_that_was_not_stopped(parent: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "ep": 2}
    train_on_ranks(2, parent, tmp_path / "whole", SPEC, steps=4, **options)
    for steps in (2, 4):
        train_on_ranks(2, parent, tmp_path / "twice", SPEC, steps=steps, **options)
    whole, twice = (export(parent, tmp_path / run, tmp_path / f"{run}-hf") for run in ("whole", "twice"))
    assert not differences(whole, twice)
    assert differences(whole, export(parent, tmp_path / "twice/iter_0000002", tmp_path / "first-hf"))
    tokens = sample_tokens(VOCABULARY, length=SEQUENCE)
    assert not logits(whole, tokens).equal(logits(parent, tokens))
