"""A training that ends by itself: a loss that is not finite, and limits that the user sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contract.trainers import IS_BRIDGE, losses, train, training_text


#: Prefix of the limits' settings.
GUARD = "upcycle." if IS_BRIDGE else "trainer.callbacks.LossGuard."


def test_a_loss_that_is_not_finite_ends_all_ranks(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    text = training_text({"lr": 1e30, "warmup": 0}, ranks=2)
    with pytest.raises(RuntimeError, match=r"of step \d is (nan|inf); expected a finite number"):
        train(text, tmp_path / "run", *inputs, ranks=2)
    assert len(losses(tmp_path / "run")) < 6


def test_unused_experts_end_the_run_if_asked(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    text = training_text({f"{GUARD}min_expert_load": 1.0, f"{GUARD}limit_steps": 3}, ranks=2)
    with pytest.raises(RuntimeError) as raised:
        train(text, tmp_path / "run", *inputs, ranks=2)
    error = str(raised.value)
    assert "Load of an expert in steps 1 to 3 is" in error
    assert "expected at least 1 in one of the last 3 steps" in error
    assert "Train in a new folder with a higher" in error
    assert "moe_aux_loss_coeff" in error
    assert len(losses(tmp_path / "run")) == 3
