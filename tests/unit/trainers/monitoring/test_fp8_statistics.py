"""Transformer Engine's statistics: the requests and the results. `tests/te` uses the real package."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.monitoring import fp8_statistics
from nemo_upcycle.trainers.monitoring.fp8_statistics import Fp8Statistics, features, require_inspect


def _asked(precision: Any) -> dict[str, list[str]]:
    """Return the requested statistics by kind of tensor."""
    engine = features(5, precision)["nemo_upcycle"]["transformer_engine"]
    plain = engine["LogTensorStats"]
    asked = {kind: list(plain["stats"]) for kind in plain["tensors"]}
    for row in engine["LogFp8TensorStats"]["tensors_struct"]:
        assert row["freq"] == plain["freq"] == 5
        asked.setdefault(row["tensor"], []).extend(row["stats"])
    return asked


def test_reads_only_scales_of_weights_kept_in_fp8() -> None:
    every = ["cur_amax", "underflows%", "scale_inv_min", "scale_inv_max"]
    assert _asked(None) == dict.fromkeys(("activation", "weight", "gradient"), every)
    for name in ("fp8_param_gather", "fp8_params"):
        asked = _asked(SimpleNamespace(**{name: True}))
        assert asked["weight"] == ["scale_inv_min", "scale_inv_max"]
        assert asked["activation"] == asked["gradient"] == every


def test_shares_are_averaged_over_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = [Fp8Statistics(), Fp8Statistics()]
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    package = SimpleNamespace(api=SimpleNamespace(transformer_engine=SimpleNamespace(step=lambda: None)))
    monkeypatch.setitem(sys.modules, "nvdlfw_inspect", package)
    monkeypatch.setitem(sys.modules, "nvdlfw_inspect.api", package.api)

    def step() -> dict[str, Any]:
        parts = []
        for rank, statistics in enumerate(ranks):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            parts.append(statistics.local())
        return ranks[0].describe({name: parts[0][name] + parts[1][name] for name in parts[0]})

    for layer, (statistics, value) in enumerate(zip(ranks, (1.0, 3.0), strict=True)):
        name = f"model.decoder.layers.{layer}.mlp.experts.linear_fc1.gemm_0_gradient"
        statistics.log_scalar(f"{name}_underflows%", torch.tensor(value), 7)
        for statistic in ("cur_amax", "scale_inv_min", "scale_inv_max", "mse"):
            statistics.log_scalar(f"{name}_{statistic}", value, 7)
    ranks[1].log_scalar("model.linear_weight_scale_inv_max", 0.5, 7)
    gradient = {"underflow": 0.02, "amax": 3.0, "scale_inv_min": 1.0, "scale_inv_max": 3.0}
    assert step() == {"fp8": {"gradient": gradient, "weight": {"scale_inv_max": 0.5}}}
    assert step() == {}


def test_a_missing_package_is_named_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_statistics, "find_spec", lambda name: None)
    require_inspect(5, "fp8_statistics_every")  # nothing is measured without a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    require_inspect(0, "fp8_statistics_every")
    with pytest.raises(SpecError) as caught:
        require_inspect(5, "fp8_statistics_every")
    assert str(caught.value).startswith("fp8_statistics_every needs the package nvdlfw-inspect")
    assert "pip install nvdlfw-inspect" in str(caught.value)
    assert fp8_statistics.watch_inspect() is None
