"""A stopped run resumes with its optimizer states under another layout, also if the old or new layout has EP 1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.contract.test_training import alone
from tests.contract.trainers import IS_BRIDGE, losses, train, training_text, weights
from tests.tiers import quick


__all__ = ["alone"]
pytestmark = [pytest.mark.slow, pytest.mark.full]
RESHARDABLE = (
    "checkpoint.dist_ckpt_optim_fully_reshardable" if IS_BRIDGE else "trainer.strategy.ckpt_optim_fully_reshardable"
)
#: Ranks and layout sizes before and after the change.
CHANGES = [
    ((1, {}), (2, {"ep": 2})),
    ((2, {"ep": 2}), (1, {})),
    ((2, {"ep": 2}), (4, {"ep": 4})),
    ((2, {"ep": 2}), (2, {"tp": 2})),
    ((2, {"tp": 2}), (2, {"pp": 2})),
    ((2, {"tp": 2, "ep": 2, "etp": 1}), (2, {})),
    ((2, {}), (4, {"pp": 2, "ep": 2})),
    ((4, {"pp": 2, "ep": 2}), (1, {})),
]


@pytest.mark.skipif(not IS_BRIDGE, reason="NeMo says it itself")
def test_states_that_were_not_saved_for_another_layout_are_refused(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    train(training_text({"steps": 2, RESHARDABLE: False, "ep": 2}, ranks=2), tmp_path / "run", *inputs, ranks=2)
    with pytest.raises(RuntimeError, match=r"got EP 1.*expected EP 2.*fully_reshardable=True"):
        train(training_text({RESHARDABLE: False}), tmp_path / "run", *inputs)


@pytest.mark.parametrize(("before", "after"), quick(CHANGES, CHANGES[1]), ids=str)
def test_a_stopped_run_goes_on_under_another_layout(
    inputs: tuple[Path, Path],
    alone: Path,
    tmp_path: Path,
    before: tuple[int, dict[str, int]],
    after: tuple[int, dict[str, int]],
) -> None:
    """The weights equal an uninterrupted run's except for rounding; fresh optimizer states would change them."""
    run = tmp_path / "run"
    (ranks, layout), (ranks_after, layout_after) = before, after
    with pytest.raises(RuntimeError, match="died"):
        train(training_text({RESHARDABLE: True, **layout}, ranks=ranks), run, *inputs, ranks=ranks, kill_at=5)
    train(training_text({RESHARDABLE: True, **layout_after}, ranks=ranks_after), run, *inputs, ranks=ranks_after)
    found, expected = weights(run), weights(alone)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=0, atol=1e-5)  # fresh states differ by 1e-3 and more
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
