"""The demo's recipe in FP8 without a GPU: it trains, on several ranks too, and resumes with the scales it had."""

from __future__ import annotations

from typing import Any

import pytest

from tests.functional.runs import Runs
from tests.tiers import quick


pytestmark = pytest.mark.slow
RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("fp8"))


@pytest.fixture(scope="module")
def delayed(runs: Runs) -> list[dict[str, Any]]:
    """What one rank does in four steps, with a checkpoint every second step."""
    return runs.train("delayed", 1, steps=4, every=2, fp8="delayed")


def test_a_killed_run_resumes_to_the_bit_under_delayed_scaling(runs: Runs, delayed: list[dict[str, Any]]) -> None:
    with pytest.raises(RuntimeError, match="rank 0 died"):
        runs.train("killed", 1, steps=4, every=2, fp8="delayed", kill=3)
    lines = runs.train("killed", 1, steps=4, every=2, fp8="delayed")
    assert [(line["step"], line["loss"], line["grad_norm"]) for line in lines] == [
        (line["step"], line["loss"], line["grad_norm"]) for line in delayed
    ]
    assert delayed[-1]["loss"] < delayed[0]["loss"] - 0.1


def test_the_lines_say_what_the_numbers_of_a_step_lose(delayed: list[dict[str, Any]]) -> None:
    """A scale of 1 loses most gradients of the first step; later ones have scales of what was seen."""
    first, last = (line["fp8"] for line in (delayed[0], delayed[-1]))
    assert set(first) == {"input", "weight", "gradient"}
    assert first["gradient"]["underflow"] > 2 * last["gradient"]["underflow"]
    for operand in (*first.values(), *last.values()):
        assert operand["amax"] > 0
        assert 0 <= operand["saturated"] <= operand["underflow"] + 1 <= 2


@pytest.mark.parametrize("recipe", quick(RECIPES, "blockwise"))
def test_the_demo_trains_in_fp8(runs: Runs, recipe: str) -> None:
    losses = [line["loss"] for line in runs.train(f"{recipe}-alone", 1, steps=4, fp8=recipe)]
    assert losses[-1] < losses[0] - 0.1
    assert losses != [line["loss"] for line in runs.train(f"{recipe}-without", 1, steps=4)]


@pytest.mark.full
@pytest.mark.parametrize("layout", [{"ep": 2}, {"tp": 2}, {"pp": 2}], ids=str)
def test_every_layout_starts_at_the_same_loss(
    runs: Runs, delayed: list[dict[str, Any]], layout: dict[str, int]
) -> None:
    (name, size), *_ = layout.items()
    lines = runs.train(f"delayed-{name}{size}", 2, steps=2, fp8="delayed", **layout)
    assert lines[0]["loss"] == pytest.approx(delayed[0]["loss"], rel=1e-3)
    assert lines[1]["loss"] == pytest.approx(delayed[1]["loss"], rel=1e-2)
