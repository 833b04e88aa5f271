"""What NeMo alone promises of the settings: they may change, are not in a checkpoint, and act or are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.trainers.schedules import part_of
from tests.contract.trainers import differing, train, training_text, weights
from tests.functional.tiny import prepare


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent, and its tokenised texts."""
    return prepare(tmp_path_factory.mktemp("inputs"))


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


WARMUP, ANNEAL = {"upcycle.router_warmup_steps": 2}, {"upcycle.aux_loss_steps": 2}
NO_LOSS = {"model.moe_router_load_balancing_type": "none"}


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("dense_ct", WARMUP, "router of the model: got none"),
        ("moe", ANNEAL | NO_LOSS, "'none' balancing"),
    ],
    ids=["dense-warmup", "no-loss"],
)
def test_settings_without_effect_are_refused(
    inputs: tuple[Path, Path], tmp_path: Path, kind: str, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(RuntimeError, match=f"SpecError: .*{words}"):
        train(training_text(settings, kind=kind), tmp_path, *inputs)
