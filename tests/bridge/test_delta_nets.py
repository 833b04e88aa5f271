"""Qwen3.5's gated delta nets get the same bits as from Bridge's own loader, and are saved, resumed and exported."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bridge.runs import SEQUENCE, SPEC, VOCABULARY, ends_as_converted, fill_twice, whole_as_in_two_halves
from tests.distributed.ranks import run_ranks
from tests.loading.cases import logits
from tests.models import sample_tokens
from tests.parents import write_qwen35
from tests.tiers import quick


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
    assert ends_as_converted(parent, tmp_path / "run", SPEC, **layout)


def test_a_resumed_training_has_the_same_bits(parent: Path, tmp_path: Path) -> None:
    whole = whole_as_in_two_halves(parent, tmp_path, lr=1e-3, ep=2)
    tokens = sample_tokens(VOCABULARY, length=SEQUENCE)
    assert not logits(whole, tokens).equal(logits(parent, tokens))
