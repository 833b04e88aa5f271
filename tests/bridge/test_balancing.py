"""Load balancing in Bridge: by an auxiliary loss over the global batch, and by quantiles of the router logits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.errors import SpecError
from nemo_upcycle.utils.files import read_json
from tests.bridge.runs import bridges_pretrain, hooked, run_config
from tests.distributed.ranks import run_ranks


SPEC = UpcycleSpec(num_experts=4, top_k=2)
QUANTILES = {"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0}


def _train(dense: Path, folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank; return the weights and biases before the first step and after every step."""
    pretrain = bridges_pretrain()
    from megatron.bridge.training.callbacks import Callback, CallbackContext

    from nemo_upcycle.trainers.bridge.callbacks import upcycle_callbacks

    config = hooked(dense, folder, asdict(SPEC), lr=1e-3, **options)
    config.checkpoint.save_interval = 2
    seen: dict[str, Any] = {"weights": [], "biases": []}

    class Watch(Callback):
        def on_train_start(self, context: CallbackContext) -> None:
            chunks = context.model
            weights = [pair for chunk in chunks for pair in chunk.named_parameters()]
            seen["weights"].append({name: weight.detach().clone() for name, weight in weights})
            buffers = [pair for chunk in chunks for pair in chunk.named_buffers()]
            seen["biases"].append({name: bias.clone() for name, bias in buffers if name.endswith("qb_beta")})

        on_train_step_end = on_train_start

    pretrain(config, callbacks=[*upcycle_callbacks(config, folder), Watch()])
    return seen


def _trained(dense: Path, folder: Path, **options: Any) -> list[Any]:
    return run_ranks(_train, 2, dense, folder, {"ep": 2, **options}, process_group=False)


def test_the_receipt_says_how_the_global_loss_acts(dense: Path, tmp_path: Path) -> None:
    model = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.02, "moe_z_loss_coeff": 1e-3}
    _trained(dense, tmp_path / "run", model=model)
    loss, z_loss = read_json(tmp_path / "run/receipt.json")["auxiliary_losses"]
    assert (loss["name"], loss["coefficient"], loss["acting"]) == ("global_aux_loss", 0.02, 0.02)
    assert "divides it by 2 on this layout, which is undone" in loss["why"]
    assert z_loss == {"name": "z_loss", "coefficient": 1e-3, "acting": 1e-3, "why": "as set"}
    assert read_json(tmp_path / "run/training.json")["balancing"] == "global_aux_loss 0.02, z_loss 0.001"
    (line,) = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    for name in ("global_load_balancing_loss", "z_loss"):
        assert all(value > 0.5 for value in line["router"][name])


@pytest.fixture(scope="module")
def whole(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The folder of a run with quantile balancing (four steps, two ranks), and the values that each rank saw."""
    folder = tmp_path_factory.mktemp("quantiles") / "run"
    return folder, _trained(dense, folder, steps=4, model=QUANTILES)


def test_quantile_biases_start_at_zero_and_move_once_a_step(whole: tuple[Path, list[Any]]) -> None:
    folder, ranks = whole
    for seen in ranks:
        start, *steps = seen["biases"]
        assert len(start) > 0
        assert not any(bias.any() for bias in start.values())
        for before, after in zip(seen["biases"], steps, strict=False):
            assert not any(torch.equal(before[name], after[name]) for name in after)
    ranges = [json.loads(line)["router"]["balancing_bias_range"] for line in (folder / "metrics.jsonl").open()]
    for step, biases in enumerate(steps):
        expected = [float(bias.max() - bias.min()) for bias in biases.values()]
        assert ranges[step] == pytest.approx(expected, abs=1e-6)
    receipt = read_json(folder / "receipt.json")
    assert receipt["balancing_bias"] == {"moe_router_quantile_balancing_ema": 0.0}
    assert receipt["exact"] is True


def test_a_resumed_run_has_the_biases_of_an_uninterrupted_one(
    dense: Path, tmp_path: Path, whole: tuple[Path, list[Any]]
) -> None:
    for steps in (2, 4):
        ranks = _trained(dense, tmp_path / "run", steps=steps, model=QUANTILES)
    for resumed, expected in zip(ranks, whole[1], strict=True):
        for kind in ("biases", "weights"):
            for name, values in expected[kind][-1].items():
                assert torch.equal(values, resumed[kind][-1][name]), name


def test_a_checkpoint_with_biases_is_evaluated_but_not_exported(
    dense: Path, tmp_path: Path, whole: tuple[Path, list[Any]]
) -> None:
    folder, ranks = whole
    checkpoint = folder / "iter_0000004"
    (loaded,) = run_ranks(_loaded, 1, checkpoint, dense)
    expected = [bias.tolist() for bias in ranks[0]["biases"][-1].values()]
    assert loaded == [pytest.approx(bias, abs=1e-7) for bias in expected]
    with pytest.raises(SpecError, match=r"quantile_balancing.*keep the model in Megatron-Bridge"):
        export_checkpoint(checkpoint, dense, tmp_path / "hf", spec=SPEC)


def test_finetuning_keeps_the_biases(dense: Path, tmp_path: Path, whole: tuple[Path, list[Any]]) -> None:
    from nemo_upcycle.trainers.bridge.finetuning import finetune_from

    finetune_from(config := run_config(dense, tmp_path / "sft", None), whole[0])
    for name, value in (QUANTILES | {"moe_router_quantile_balancing_ema": 0.0}).items():
        assert getattr(config.model, name) == value
    with pytest.raises(SpecError, match="moe_router_load_balancing_type cannot be seq_aux_loss"):
        finetune_from(config, whole[0], moe_router_load_balancing_type="seq_aux_loss")


def _loaded(checkpoint: Path, dense: Path) -> list[list[float]]:
    from nemo_upcycle.evaluation.megatron.chunks import layout_here, load_chunks

    (chunk,), _ = load_chunks(checkpoint, dense, SPEC, layout_here(), torch.float32)
    return [buffer.tolist() for name, buffer in chunk.named_buffers() if name.endswith("qb_beta")]


@pytest.mark.parametrize(
    ("model", "experts", "words"),
    [
        (QUANTILES | {"moe_aux_loss_coeff": 0.01}, 4, "moe_aux_loss_coeff is 0.01; expected 0 with"),
        (QUANTILES, 6, "64 tokens of 2 experts each|tokens that all experts can have as many of"),
    ],
)
def test_refuses_impossible_quantiles_before_building(
    dense: Path, tmp_path: Path, model: dict[str, Any], experts: int, words: str
) -> None:
    from nemo_upcycle.trainers.bridge.upcycling import check

    config = hooked(dense, tmp_path / "run", {"num_experts": experts, "top_k": 2}, model=model)
    with pytest.raises(SpecError, match=words):
        check(config)
