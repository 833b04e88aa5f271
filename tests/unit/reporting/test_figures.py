from __future__ import annotations

from pathlib import Path

from nemo_upcycle.reporting.figures import draw_expert_load, draw_losses
from nemo_upcycle.reporting.run_folder import Curve
from tests.unit.reporting.conftest import metrics


STEPS = [line for line in metrics("pretrain") if "loss" in line]


def test_losses_without_validation(tmp_path: Path) -> None:
    draw_losses({"pretrain": Curve(STEPS[:1], [])}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5000


def test_a_dense_stage_has_no_expert_figure(tmp_path: Path) -> None:
    dense = [line for line in metrics("dense_ct") if "loss" in line]
    assert draw_expert_load(Curve(dense, []), tmp_path / "experts.png") is False
    assert list(tmp_path.iterdir()) == []


def test_perfect_balance_can_be_drawn(tmp_path: Path) -> None:
    assert draw_expert_load(Curve(STEPS[1:2], []), tmp_path / "experts.png") is True
