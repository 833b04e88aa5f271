"""What this package adds to a training acts in a real job: on weights, in Megatron's router, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.trainers.schedules import Anneal, part_of
from nemo_upcycle.utils.files import read_json
from tests.contract.trainers import IS_BRIDGE, differing, losses, train, training_text, weights
from tests.functional.tiny import BATCH, LAYERS
from tests.tiers import quick


pytestmark = [pytest.mark.slow, pytest.mark.full]
#: Everything at once: the settings of the runs that stop and resume.
ALL = {
    "upcycle.router_lr_mult": 4.0,
    "upcycle.expert_lr_mult": 0.5,
    "upcycle.router_warmup_steps": 3,
    "upcycle.aux_loss_end": 0.002,
    "upcycle.aux_loss_steps": 5,
}
ANNEAL = Anneal(start=0.01, end=0.002, steps=5)
#: Learning rates that NeMo's own schedulers would write over those of the parts.
OF_NEMO = [(1, {"optim.lr_scheduler.constant_steps": 1, "steps": 3}), (1, {"optim.lr_scheduler": None})]
LAYOUTS = [(1, {}), (2, {"ep": 2}), (4, {"tp": 2, "pp": 2}), *([] if IS_BRIDGE else OF_NEMO)]
BF16 = {} if IS_BRIDGE else {"trainer.plugins.precision": "bf16-mixed", "trainer.plugins.params_dtype": torch.bfloat16}

OF_NEMO_ALONE = pytest.mark.skipif(IS_BRIDGE, reason="it is about NeMo's checkpoints, and jobs")


@pytest.fixture(scope="module")
def start(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights that every training begins with."""
    folder = tmp_path_factory.mktemp("start") / "run"
    train(training_text({"steps": 1, "lr": 0.0, "min_lr": 0.0}), folder, *inputs)
    return weights(folder)


@pytest.fixture(scope="module")
def whole(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """Six steps with all settings that nothing stopped, and the coefficients that the routers had."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    (used,) = train(training_text(ALL), folder, *inputs)
    return folder, used


def _moves(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    return torch.cat([(after[name] - before[name]).flatten() for name in before if part_of(name) == part])


@pytest.mark.parametrize(("ranks", "layout"), quick(LAYOUTS, (2, {"ep": 2})), ids=str)
def test_multipliers_scale_the_first_update(
    inputs: tuple[Path, Path], start: dict[str, torch.Tensor], tmp_path: Path, ranks: int, layout: dict[str, Any]
) -> None:
    moves: list[dict[str, torch.Tensor]] = []
    factors = {"router": 4.0, "experts": 0.5, "rest": 1.0}
    for scaled in (False, True):
        settings = {"upcycle.router_lr_mult": 4.0, "upcycle.expert_lr_mult": 0.5} if scaled else {}
        base = {"warmup": 0, "steps": 1, "save_every": 1}
        train(training_text(base | layout | settings, ranks=ranks), tmp_path / f"{scaled}", *inputs, ranks=ranks)
        after = weights(tmp_path / f"{scaled}", 1)
        moves.append({part: _moves(start, after, part) for part in factors})
    for part, factor in factors.items():
        assert (moves[0][part] != 0).double().mean() > 0.5
        torch.testing.assert_close(moves[1][part], factor * moves[0][part], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("freezes", quick(["experts", "all"], "experts"))
def test_frozen_parts_keep_their_bits_until_the_warmup_ends(
    inputs: tuple[Path, Path], tmp_path: Path, freezes: str
) -> None:
    settings = {"upcycle.router_warmup_steps": 2, "upcycle.router_warmup_freezes": freezes, "warmup": 0, "ep": 2}
    text = training_text(BF16 | settings | {"steps": 3, "save_every": 1}, ranks=2)
    train(text, tmp_path / "run", *inputs, ranks=2)
    first, second, third = (weights(tmp_path / "run", step) for step in (1, 2, 3))
    for part in ("router", "experts", "rest"):
        is_still = part == "experts" or (part, freezes) == ("rest", "all")
        assert bool(_moves(first, second, part).any()) is not is_still
        assert bool(_moves(second, third, part).any())


def test_the_router_uses_the_scheduled_coefficient(whole: tuple[Path, list[float]]) -> None:
    folder, used = whole
    expected = [ANNEAL.at(step) for step in range(6) for _ in range(LAYERS * BATCH)]
    assert used[-len(expected) :] == pytest.approx(expected, rel=1e-12)  # the first measure how the loss acts
    assert read_json(folder / "training.json")["balancing"] == "aux_loss 0.01, to 0.002 in the first 5 steps (cosine)"


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {"ep": 2} | BF16)], ids=["alone", "ep2"])
def test_a_killed_run_resumes_with_the_same_values(
    inputs: tuple[Path, Path], whole: tuple[Path, list[float]], tmp_path: Path, ranks: int, layout: dict[str, Any]
) -> None:
    """In the middle of the warm-up and of the anneal; of two ranks one has no share of the routers' masters."""
    text, unstopped = training_text(ALL | layout, ranks=ranks), whole[0]
    if layout:
        unstopped = tmp_path / "whole"
        train(text, unstopped, *inputs, ranks=ranks)
    with pytest.raises(RuntimeError, match=r"rank \d died"):
        train(text, tmp_path / "run", *inputs, ranks=ranks, kill_at=5)
    used = train(text, tmp_path / "run", *inputs, ranks=ranks)
    assert used[0][-1] == ANNEAL.at(5)
    assert losses(tmp_path / "run") == losses(unstopped)
    assert differing(weights(tmp_path / "run"), weights(unstopped)) == []


@OF_NEMO_ALONE
def test_settings_may_change_when_a_run_resumes_and_a_checkpoint_has_none(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    from nemo import lightning as nl
    from nemo.lightning.io import load_context

    settings = {"upcycle.router_lr_mult": 4.0, "upcycle.router_warmup_steps": 3, "upcycle.aux_loss_steps": 5}
    train(training_text(settings | {"steps": 2}), tmp_path, *inputs)
    model = load_context(last_checkpoint(tmp_path) / "context", subpath="model")
    assert type(model.optim) is nl.MegatronOptimizerModule
    assert model.config.moe_aux_loss_coeff == 0.01
    changed = {"upcycle.router_lr_mult": 0.0, "upcycle.expert_lr_mult": 2.0}
    (used,) = train(training_text(changed | {"steps": 4}), tmp_path, *inputs)
    assert used[-1] == 0.01  # the model's own again
    names = differing(weights(tmp_path, 2), weights(tmp_path, 4))
    assert {part_of(name) for name in names} == {"experts", "rest"}


@OF_NEMO_ALONE
@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("dense_ct", {"upcycle.router_warmup_steps": 2}, "router of the model: got none"),
        ("moe", {"upcycle.aux_loss_steps": 2, "model.moe_router_load_balancing_type": "none"}, "'none' balancing"),
    ],
    ids=["dense-warmup", "no-loss"],
)
def test_settings_without_effect_are_refused(
    inputs: tuple[Path, Path], tmp_path: Path, kind: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(RuntimeError, match=f"SpecError: .*{words}"):
        train(training_text(settings, kind=kind), tmp_path, *inputs)
