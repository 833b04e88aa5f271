"""Upcycling with a calibration file is exact, equals conversion bit for bit, and refuses another parent or spec."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.init.calibration_file import Calibration
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.sources.same_parent import require_calibration
from nemo_upcycle.trainers.equivalence import megatron_logits
from tests.folders import change_weights
from tests.models import (
    build_chunks,
    hugging_face_logits,
    moe_settings,
    require_same_weights,
    sample_tokens,
    weights_of,
    write_llama,
)
from tests.unit.online.samples import calibrated


COPIES: dict[str, Any] = {"num_experts": 4, "top_k": 2}
GRANULAR: dict[str, Any] = {"num_experts": 8, "top_k": 4, "granularity": 2}
CASES = {
    "copies": COPIES,
    "granular, shared": GRANULAR | {"shared_experts": 1},
    "granular, mixed layers, noise, sigmoid": GRANULAR
    | {"moe_layers": "1", "method": "noise", "router_score": "sigmoid"},
}

pytestmark = pytest.mark.usefixtures("megatron")


def _model(dense: Path, spec: UpcycleSpec) -> Any:
    (model,) = build_chunks(dense, **moe_settings(read_architecture(dense), spec))
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_model_has_the_bits_of_the_conversion(dense: Path, tmp_path: Path, case: str) -> None:
    spec = calibrated(dense, tmp_path / "file", **CASES[case])
    model = _model(dense, spec)
    with open_dense(dense) as source:
        receipt = upcycle_into([model], source, spec)
        convert(source, tmp_path / "offline", spec)
    assert receipt.exact is (spec.method == "copy")
    assert receipt.calibration == {"path": spec.calibration, "sha256": Calibration(tmp_path / "file").sha256}
    export_weights(
        LiveWeights(model), read_architecture(dense).upcycled(spec), dense, tmp_path / "online", dtype=torch.float32
    )
    require_same_weights(tmp_path / "online", tmp_path / "offline")
    if receipt.exact:
        tokens = sample_tokens(250)
        wanted, got = hugging_face_logits(dense, tokens), megatron_logits(model.eval(), tokens)[..., :250]
        assert float((got - wanted).norm() / wanted.norm()) < 1e-5


def test_router_rows_are_the_files_times_the_spread(dense: Path, tmp_path: Path) -> None:
    spec = replace(calibrated(dense, tmp_path / "file", **CASES["granular, shared"]), router_spread=0.5)
    model, file = _model(dense, spec), Calibration(tmp_path / "file")
    with open_dense(dense) as source:
        receipt = upcycle_into([model], source, spec)
    made_by = {record.name: record.made_by for record in receipt.parameters}
    for layer in (0, 1):
        router_ED = model.decoder.layers[layer].mlp.router.weight
        assert torch.equal(router_ED, file.router(layer).mul(0.5).repeat_interleave(2, dim=0))
        name = f"decoder.layers.{layer}.mlp"
        assert made_by[f"{name}.router.weight"] == f"router_init=prompts, spread=0.5, calibration {file.sha256[:12]}"
    others = [text for name, text in made_by.items() if "attention" in name or "norm" in name]
    assert set(others) == {"copied"}


def _made_of_more_neurons(dense: Path, file: Path) -> None:
    calibrated(write_llama(file.with_name("other"), layers=2, intermediate_size=128), file, **COPIES)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda dense, file: None, None),
        (lambda dense, file: file.write_bytes(b"cut"), None),
        (lambda dense, file: save_file({"rows": torch.zeros(4, 64)}, file), "missing"),
        (
            lambda dense, file: calibrated(dense, file, **COPIES, moe_layers="0"),
            "has no rows for layer 1, which has experts (moe_layers=all)",
        ),
        (lambda dense, file: calibrated(dense, file, **COPIES | {"num_experts": 8}), 8),
        (_made_of_more_neurons, 128),
    ],
    ids=["removed", "cut", "something else", "a layer less", "other experts", "more neurons"],
)
def test_a_file_of_something_else_is_refused(dense: Path, tmp_path: Path, change: Any, got: object) -> None:
    file = tmp_path / "file"
    spec = calibrated(dense, file, **COPIES)
    file.unlink()
    change(dense, file)
    with open_dense(dense) as source:
        for fill in (partial(upcycle_into, [_model(dense, spec)]), partial(convert, output=tmp_path / "moe")):
            with pytest.raises(UpcycleError) as refused:
                fill(source, spec=spec)
            assert got in (None, refused.value.got)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "post_attention_layernorm.weight"])
def test_a_file_of_a_parent_with_other_weights_is_refused(dense: Path, tmp_path: Path, name: str) -> None:
    spec, name = calibrated(dense, tmp_path / "file", **COPIES), f"model.layers.1.{name}"
    other = write_llama(tmp_path / "other", layers=2)
    with open_dense(other) as source:
        assert require_calibration(source, spec)
    change_weights(other, {name: weights_of(other)[name] * 1.5})
    with (
        open_dense(other) as source,
        pytest.raises(CheckpointError, match=r"was made from the weights of .*, not from those of "),
    ):
        require_calibration(source, spec)


def test_a_spec_without_a_file_is_refused(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").touch()
    spec = UpcycleSpec(**COPIES, router_init="prompts", router_prompts=str(tmp_path / "prompts"))
    with open_dense(dense) as source, pytest.raises(SpecError, match="calibration is missing: "):
        upcycle_into([_model(dense, spec)], source, spec)
