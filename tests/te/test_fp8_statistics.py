"""The parts of Transformer Engine's statistics and of nvdlfw-inspect that work without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_upcycle.trainers.monitoring import fp8_statistics


@pytest.fixture
def inspect(tmp_path: Path) -> Iterator[SimpleNamespace]:
    api = pytest.importorskip("nvdlfw_inspect.api")
    fp8_statistics.start_inspect(2, None, tmp_path)
    yield api
    api.end_debug()


def test_every_layer_is_asked_and_its_log_described(inspect: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformer_engine.pytorch as te
    from nvdlfw_inspect.logging import MetricLogger

    module = torch.nn.ModuleDict({"linear_fc1": te.Linear(32, 32, device="cpu")})
    inspect.infer_and_assign_layer_names([module])
    layer = module["linear_fc1"]
    assert layer.name == "model.linear_fc1"
    for kind in ("activation", "weight", "gradient"):
        asked = [
            inspect.transformer_engine.inspect_tensor_enabled(layer_name=layer.name, tensor_name=kind, iteration=step)
            for step in range(3)
        ]
        assert [bool(enabled) for enabled, _ in asked] == [True, False, True]

    statistics = fp8_statistics.watch_inspect()
    assert statistics is not None
    MetricLogger.log_scalar(f"{layer.name}_activation_underflows%", 25.0, 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    assert statistics.describe(statistics.local()) == {"fp8": {"input": {"underflow": 0.25}}}
