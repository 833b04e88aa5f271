"""Settings of `config.upcycle` that only Bridge has: loss spikes, hung ranks, refusals before a start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.pipeline.plan import open_training
from nemo_upcycle.sources.find import Parent
from tests.bridge.runs import SPEC, bridges_pretrain, differences, export, hooked, run_config
from tests.bridge.test_chain import BEFORE, plan_of
from tests.contract.trainers import metrics, train, training_text
from tests.distributed.ranks import run_ranks
from tests.functional.stages import run_stages
from tests.functional.started import under_ft_launcher
from tests.waiting import HANG_S


def test_a_spike_ends_the_run_on_all_ranks(inputs: Path, tmp_path: Path) -> None:
    settings = {"upcycle.spike_threshold": 0.0, "upcycle.stop_on_spike": "true", "steps": 60, "pp": 2}
    text = training_text(settings | {"lr": 0.0, "min_lr": 0.0}, ranks=2)
    with pytest.raises(RuntimeError, match=r"Loss of step \d+ is [\d.]+; expected at most"):
        train(text, tmp_path, inputs / "parent", inputs / "blend", ranks=2)
    (spike,) = metrics(tmp_path, "loss_spike")
    assert spike["loss_spike"] > spike["limit"]


def test_settings_without_the_callbacks_that_carry_them_out_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the run has none of the callbacks"):
        run_ranks(_train_alone, 1, dense, tmp_path / "run", process_group=False)


def _train_alone(dense: Path, folder: Path) -> None:
    pretrain = bridges_pretrain()
    config = hooked(dense, folder, SPEC)
    config.upcycle.stop_on_spike = True
    pretrain(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("spike_window", 0), ("evaluate_limit", 0), ("fp8_statistics_every", -1)],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    from nemo_upcycle.trainers.bridge.settings import UpcycleSettings

    with pytest.raises(SpecError) as caught:
        UpcycleSettings(**{name: value}).check()
    assert caught.value.field == name


def test_fp8_statistics_on_a_gpu_are_bridges_own(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_upcycle.trainers.bridge.callbacks import upcycle_callbacks
    from nemo_upcycle.trainers.bridge.node import UpcyclingConfig
    from nemo_upcycle.trainers.monitoring import fp8_statistics

    config = UpcyclingConfig.of(run_config(dense, tmp_path / "run", UpcycleSpec(num_experts=4, top_k=2)))
    config.upcycle.fp8_statistics_every = 10
    upcycle_callbacks(config, tmp_path)
    assert config.tensor_inspect is None  # without a GPU, the FP8 emulation collects the statistics
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(fp8_statistics, "find_spec", lambda name: None)
    for refused in (
        lambda: upcycle_callbacks(config, tmp_path),
        lambda: open_training("bridge", training_text({"upcycle.fp8_statistics_every": 10})).check_here("pretrain"),
    ):
        with pytest.raises(SpecError, match="pip install nvdlfw-inspect"):
            refused()
    monkeypatch.setattr(fp8_statistics, "find_spec", lambda name: object())
    upcycle_callbacks(config, tmp_path)
    assert config.tensor_inspect.enabled
    assert config.tensor_inspect.features == fp8_statistics.features(10, None)
    config.tensor_inspect.features = "mine.yaml"
    upcycle_callbacks(config, tmp_path)
    assert config.tensor_inspect.features == "mine.yaml"


def test_watchers_may_change_in_a_started_run() -> None:
    watches = {"spike_window": 9, "spike_threshold": 4.0, "evaluate_every": 5, "fp8_statistics_every": 3}
    text = training_text({f"upcycle.{name}": value for name, value in watches.items()})
    found = open_training("bridge", text).settings()
    assert {f"upcycle.{name}" for name in watches} <= found.free.keys()


def test_a_forecast_knows_the_optimizer(inputs: Path) -> None:
    text = training_text({"optimizer.optimizer": "dist_muon"})
    facts = open_training("bridge", text).facts(Parent(str(inputs / "parent")))
    assert facts is not None
    assert facts.computation.optimizer == "dist_muon"


@pytest.mark.full
@pytest.mark.weekly
def test_a_hung_rank_is_restarted_without_a_trace(inputs: Path, tmp_path: Path) -> None:
    for folder, once in (("whole", ""), ("hung", str(tmp_path / "once"))):
        run_dir = tmp_path / folder
        plan_of(inputs, run_dir)
        run_stages(run_dir, BEFORE)
        process = under_ft_launcher("tests.bridge.ft_rank", run_dir, once)
        _, said = process.communicate(timeout=HANG_S)
        assert process.returncode == 0, said[-3000:]
        export(inputs / "parent", run_dir / "pretrain/checkpoints", run_dir / "hf")
    assert (tmp_path / "once").exists()
    assert differences(tmp_path / "whole/hf", tmp_path / "hung/hf") == []
