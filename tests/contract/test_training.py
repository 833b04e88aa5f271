"""A training through the contract: its files and layouts, a kill and a resume, in float32 and in FP8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.utils.files import read_json
from tests.contract.trainers import IS_BRIDGE, differing, fp8, losses, metrics, train, training_text, weights
from tests.functional.tiny import BATCH, EXPERTS, LAYERS, SEQUENCE
from tests.tiers import quick


pytestmark = pytest.mark.slow
LAYOUTS = [(2, {"ep": 2}), (2, {"tp": 2}), (2, {"pp": 2}), (8, {"tp": 2, "pp": 2, "ep": 2})]


@pytest.fixture(scope="module")
def alone(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted training of six steps on one rank."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train(training_text(), folder, *inputs)
    return folder


def test_every_step_has_a_complete_line(alone: Path) -> None:
    lines = metrics(alone)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert set(line) == {
            *("step", "loss", "grad_norm", "lr", "tokens", "seconds", "tokens_per_s", "tokens_per_s_per_gpu"),
            *("tflops_per_gpu", "memory_gib", "expert_load", "router"),
        }
        assert line["tokens"] == line["step"] * BATCH * SEQUENCE
        assert line["tokens_per_s"] == pytest.approx(BATCH * SEQUENCE / line["seconds"], rel=0.05)
        assert line["grad_norm"] > 0
        assert len(line["expert_load"]) == len(line["router"]["load_balancing_loss"]) == LAYERS
        for shares in line["expert_load"]:
            assert len(shares) == EXPERTS
            assert sum(shares) == pytest.approx(1.0, abs=1e-4)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    validated = {(line["step"], line["validation_loss"]) for line in metrics(alone, "validation_loss")}
    assert sorted(step for step, _ in validated)[-2:] == [3, 6]
    assert len({step for step, _ in validated}) == len(validated)  # a repeated validation has the same loss


def test_training_json_holds_the_settings_that_act(inputs: tuple[Path, Path], alone: Path) -> None:
    settings = read_json(alone / "training.json")
    assert settings["flops_per_token"]["full"] > settings["flops_per_token"]["causal"] > 0
    expected: dict[str, Any] = {"max_steps": 6, "ranks": 1, "micro_batch_size": 1, "global_batch_size": BATCH}
    expected |= {"seq_length": SEQUENCE, "optimizer": "adam", "weight_decay": 0.1, "max_lr": 1e-3}
    expected |= {"data": f"blend tiny ({inputs[1].name})", "balancing": "aux_loss 0.01"}
    assert {name: settings[name] for name in expected} == expected
    assert settings["precision"].startswith("32")
    assert settings["schedule"]["min_lr"] == 1e-5
    assert max(losses(alone, "lr")) == pytest.approx(1e-3)


@pytest.mark.full
@pytest.mark.parametrize(("ranks", "layout"), quick(LAYOUTS, (2, {"tp": 2})), ids=str)
def test_every_layout_starts_at_the_same_loss(
    inputs: tuple[Path, Path], alone: Path, tmp_path: Path, ranks: int, layout: dict[str, int]
) -> None:
    run = tmp_path / "run"
    train(training_text({"steps": 2, **layout}, ranks=ranks), run, *inputs, ranks=ranks)
    for got, expected in zip(metrics(run), metrics(alone)[:2], strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
        assert got["expert_load"] == [pytest.approx(shares, abs=5e-3) for shares in expected["expert_load"]]
        for name in ("load_min", "load_max", "load_cv", "load_balancing_loss"):
            assert got["router"][name] == pytest.approx(expected["router"][name], rel=0.02, abs=5e-3), name
    receipt = read_json(run / "receipt.json")
    assert receipt["ranks"] == ranks
    assert receipt["bytes_read"] == receipt["bytes_needed"]


def receipt_time(folder: Path) -> int:
    """Return the time of the first receipt; Bridge writes it beside the checkpoints and copies it at the end."""
    return min(folder.rglob("receipt.json")).stat().st_mtime_ns


def test_a_finished_run_is_not_upcycled_again(inputs: tuple[Path, Path], alone: Path) -> None:
    before, receipt = metrics(alone), receipt_time(alone)
    train(training_text(), alone, *inputs)
    assert (metrics(alone), receipt_time(alone)) == (before, receipt)


#: float32 and the recipes of FP8. Bridge is tested with one recipe.
PRECISIONS = [
    "float32",
    pytest.param("delayed", marks=pytest.mark.full),
    *quick([] if IS_BRIDGE else ["tensorwise", "blockwise", "mxfp8"]),
]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_killed_run_ends_with_the_same_bits(
    inputs: tuple[Path, Path], alone: Path, tmp_path: Path, precision: str
) -> None:
    """With delayed scaling, the checkpoint must keep the scales."""
    whole, text = alone, training_text()
    if precision != "float32":
        whole, text = tmp_path / "whole", training_text(fp8(precision))
        train(text, whole, *inputs)
        for numbers in metrics(whole)[-1]["fp8"].values():
            assert numbers["amax"] > 0
            assert 0 <= numbers["saturated"] <= numbers["underflow"] + 1 <= 2
        assert losses(whole)[0] != losses(alone)[0]
        assert losses(whole)[-1] < losses(whole)[0] - 0.1
    killed = tmp_path / "killed"
    with pytest.raises(RuntimeError, match="rank 0 died"):
        train(text, killed, *inputs, kill_at=5)
    receipt = receipt_time(killed)
    train(text, killed, *inputs)
    assert receipt_time(killed) == receipt
    for name in ("loss", "grad_norm", "lr", "router"):
        assert losses(killed, name) == losses(whole, name), name
    assert differing(weights(killed), weights(whole)) == []


def test_a_run_recovers_the_same_bits_from_a_damaged_checkpoint(
    inputs: tuple[Path, Path], alone: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    with pytest.raises(RuntimeError, match="rank 0 died"):
        train(training_text(), damaged, *inputs, kill_at=7)
    newest = newest_checkpoint(damaged / "checkpoints")
    shard = max(newest.rglob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    train(training_text(), damaged, *inputs)
    assert (damaged / "checkpoints_aside" / newest.name).is_dir()
    assert losses(damaged) == losses(alone)
    assert differing(weights(damaged), weights(alone)) == []
