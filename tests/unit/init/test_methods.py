"""An init method is one class in one file: a method of another package works online, offline and in the receipt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.init.experts import ExpertMatrix
from nemo_upcycle.init.methods import METHODS, Method, register
from nemo_upcycle.spec import INIT_METHODS
from tests.models import build_chunks, moe_settings, require_same_weights, weights_of


pytestmark = pytest.mark.usefixtures("megatron")


class Alternate(Method):
    """Flip the sign of every second neuron of the down projection; odd experts begin with the first one."""

    name, summary = "alternate", "copies with every second neuron's sign flipped"

    def inexact_because(self, spec: UpcycleSpec) -> str:
        return "half of the neurons have the other sign"

    def change(self, spec: UpcycleSpec, matrix: ExpertMatrix) -> None:
        if matrix.part == "down":
            numbers = torch.arange(matrix.first, matrix.first + len(matrix.local_FD))
            matrix.local_FD[(numbers + matrix.expert) % 2 == 1] *= -1


@pytest.fixture
def alternate() -> Iterator[UpcycleSpec]:
    """The spec of a method that is registered from outside."""
    register(Alternate)
    yield UpcycleSpec(num_experts=4, top_k=2, method="alternate")
    del METHODS["alternate"], INIT_METHODS["alternate"]


def test_a_method_from_outside_gives_the_same_bits_online_and_offline(
    alternate: UpcycleSpec, dense: Path, tmp_path: Path
) -> None:
    with open_dense(dense) as source:
        arch = source.architecture
        (model,) = build_chunks(dense, **moe_settings(arch, alternate))
        receipt = upcycle_into([model], source, alternate)
        done = convert(source, tmp_path / "offline", alternate, progress=False)
    export_weights(LiveWeights(model), arch.upcycled(alternate), dense, tmp_path / "online", dtype=torch.float32)
    require_same_weights(tmp_path / "online", tmp_path / "offline")
    offline = weights_of(tmp_path / "offline")
    parent = weights_of(dense)["model.layers.1.mlp.down_proj.weight"]
    for expert in range(4):
        wanted = parent.clone()
        wanted[:, (expert + 1) % 2 :: 2] *= -1
        assert torch.equal(offline[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"], wanted)
    assert done.inexact_because == ("half of the neurons have the other sign",) == alternate.inexact_because
    made_by = {record.made_by for record in receipt.parameters if "local_experts" in record.name}
    assert made_by == {"copied, alternate (seed 1234)"}


@pytest.mark.parametrize("looks_first", [True, False])
def test_a_method_that_overflows_the_models_type_is_refused(
    monkeypatch: pytest.MonkeyPatch, alternate: UpcycleSpec, dense: Path, looks_first: bool
) -> None:
    def blow_up(self: Method, spec: UpcycleSpec, matrix: ExpertMatrix) -> None:
        if looks_first:
            matrix.whole_FD()
        matrix.local_FD.mul_(1e6)

    monkeypatch.setattr(Alternate, "change", blow_up)
    with open_dense(dense) as source:
        (model,) = build_chunks(dense, params_dtype=torch.float16, **moe_settings(source.architecture, alternate))
        words = r"gate_proj\.weight: got larger ones, expected numbers that float16 can hold"
        with pytest.raises(CheckpointError, match=words):
            upcycle_into([model], source, alternate)


def test_a_name_that_is_taken_is_refused() -> None:
    class Copy(Method):
        name, summary = "copy", "other copies"

    with pytest.raises(SpecError, match="init method: got a second 'copy'"):
        register(Copy)
    assert type(METHODS["copy"]) is not Copy


def test_an_unknown_method_is_told_with_those_that_exist() -> None:
    with pytest.raises(
        SpecError, match=r"method 'noize' does not exist. Did you mean 'noise'\? Valid: copy, drop, noise"
    ):
        UpcycleSpec(method="noize")
