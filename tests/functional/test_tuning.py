"""Fine-tuning that only NeMo has: LoRA, and a start from the result of another training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.planning.memory import lora_params
from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.utils.files import read_json
from tests.contract.packs import answer_loss, write_packs
from tests.contract.trainers import differing, losses, train, training_text, weights
from tests.tiers import quick


pytestmark = [pytest.mark.slow, pytest.mark.full]
SPEC = UpcycleSpec(num_experts=8, top_k=2)
FROZEN = {"steps": 1, "lr": 0.0, "min_lr": 0.0}
#: Settings that avoid padding rows, which no exported model has.
ADAPTED = {"steps": 4, "lr": 1e-2, "model.make_vocab_size_divisible_by": 260, "trainer.val_check_interval": 1}
RECOMPUTED = {"model.recompute_granularity": "full", "model.recompute_method": "uniform"}
RECOMPUTED |= {"model.recompute_num_layers": 1}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent, and packs of conversations for it."""
    return write_packs(tmp_path_factory.mktemp("inputs"))


def _adapt(settings: dict[str, Any] | None = None, ranks: int = 1) -> str:
    settings = ADAPTED | {"peft.dim": 4, "peft.alpha": 8} | (settings or {})
    return training_text(settings, kind="moe_sft", ranks=ranks, peft_scheme="lora")


@pytest.fixture(scope="module")
def adapted(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted LoRA run."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    train(_adapt(), folder, *inputs)
    return folder


def test_lora_trains_adapters_and_routers_and_keeps_all_other_bits(
    inputs: tuple[Path, Path], adapted: Path, tmp_path: Path
) -> None:
    train(training_text(ADAPTED | FROZEN, kind="moe_sft"), tmp_path / "before", *inputs)
    validated = losses(adapted, "validation_loss")
    assert validated[-1] < validated[0] - 0.02
    assert read_json(adapted / "training.json")["lora"] == {"rank": 4, "alpha": 8}
    before, after = weights(tmp_path / "before"), weights(adapted)
    adapters = {name: after.pop(name) for name in after.keys() - before.keys()}
    changed = differing(before, after)
    assert changed
    assert all(".mlp.router." in name for name in changed)
    assert all(".adapter." in name and tensor.abs().max() > 0 for name, tensor in adapters.items())
    modules = {name.partition(".adapter.")[0].rpartition(".")[2] for name in adapters}
    assert modules == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    arch = read_architecture(inputs[0]).upcycled(SPEC)
    routers = sum(math.prod(tensor.shape) for name, tensor in before.items() if ".mlp.router." in name)
    assert (sum(tensor.numel() for tensor in adapters.values()), routers) == lora_params(arch, 4)


def test_an_export_adds_loras_adapters_up(inputs: tuple[Path, Path], adapted: Path, tmp_path: Path) -> None:
    """Hugging Face computes the same with the exported weights as Megatron with the adapters."""
    export_checkpoint(last_checkpoint(adapted), inputs[0], tmp_path / "hf", spec=SPEC, dtype=torch.float32)
    expected = answer_loss(tmp_path / "hf", inputs[1] / "validation.npy")
    assert losses(adapted, "validation_loss")[-1] == pytest.approx(expected, abs=2e-5)


def test_a_resumed_lora_ends_with_the_same_bits(inputs: tuple[Path, Path], adapted: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="rank 0 died"):
        train(_adapt(), tmp_path, *inputs, kill_at=6)
    train(_adapt(), tmp_path, *inputs)
    assert differing(weights(adapted), weights(tmp_path)) == []


@pytest.mark.parametrize(
    ("ranks", "change", "equal"),
    # Each pipeline stage draws its own adapters. The first loss is equal, because new adapters add nothing.
    [(2, {}, 4), (2, {"pp": 2}, 1), (1, RECOMPUTED, 4)],
    ids=["data", "pp", "recompute"],
)
def test_loras_losses_are_independent_of_the_layout(
    inputs: tuple[Path, Path], adapted: Path, tmp_path: Path, ranks: int, change: dict[str, Any], equal: int
) -> None:
    train(_adapt(change, ranks), tmp_path, *inputs, ranks=ranks)
    changed = losses(tmp_path)
    assert changed[:equal] == pytest.approx(losses(adapted)[:equal], abs=2e-4)
    assert changed[-1] < changed[0] - 0.5


def test_a_start_from_loras_checkpoint_is_refused(inputs: tuple[Path, Path], adapted: Path) -> None:
    from nemo_upcycle.trainers.nemo.upcycling import UpcycleConfig

    with pytest.raises(SpecError, match="LoRA") as caught:
        UpcycleConfig(path=str(inputs[0]), checkpoint=str(adapted))
    assert caught.value.field == "checkpoint"


@pytest.mark.parametrize("kind", quick(["moe_sft", "dense_sft"], "moe_sft"))
def test_a_tuning_starts_from_another_training_on_another_layout(
    inputs: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    train(training_text({"steps": 2}, kind=kind), first, *inputs)
    train(training_text(FROZEN | {"tp": 2}, kind=kind, ranks=2, start=str(first)), second, *inputs, ranks=2)
    assert differing(weights(first), weights(second)) == []
    assert not (second / "receipt.json").exists()
