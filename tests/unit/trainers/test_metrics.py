"""Statistics that NeMo's metrics start before the model is built."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nemo.utils.app_state import AppState

from nemo_upcycle.errors import SpecError
from nemo_upcycle.recipes import smollm2_135m_e8t2
from nemo_upcycle.trainers.monitoring import fp8_statistics
from nemo_upcycle.trainers.nemo import metrics
from nemo_upcycle.trainers.nemo.metrics import MetricsLogger
from nemo_upcycle.trainers.nemo.starting import lacking_here
from nemo_upcycle.trainers.settings import of_class


def test_fp8_statistics_start_before_the_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(metrics, "start_inspect", lambda *given: started.append(given))
    monkeypatch.setattr(AppState(), "log_dir", tmp_path)
    precision = SimpleNamespace(fp8_param_gather=True)
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(dtype_config=precision))
    asked, model = MetricsLogger(fp8_statistics_every=10), SimpleNamespace()
    asked.setup(trainer, model, "fit")  # type: ignore[arg-type]  # the emulation counts
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    MetricsLogger().setup(trainer, model, "fit")  # type: ignore[arg-type]
    assert not started

    monkeypatch.setattr(fp8_statistics, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match="pip install nvdlfw-inspect"):
        asked.setup(trainer, model, "fit")  # type: ignore[arg-type]
    recipe = smollm2_135m_e8t2.pretrain_recipe(dir=str(tmp_path))
    of_class(recipe.trainer.callbacks, "MetricsLogger").fp8_statistics_every = 10
    field = "pretrain.trainer.callbacks.MetricsLogger.fp8_statistics_every"
    assert field in [error.field for error in lacking_here(recipe, "pretrain.")]

    monkeypatch.setattr(fp8_statistics, "find_spec", lambda name: object())
    asked.setup(trainer, model, "fit")  # type: ignore[arg-type]
    assert started == [(10, precision, tmp_path)]
