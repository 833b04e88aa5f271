"""Router weights: the right spread, different rows, and the same numbers under every layout."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.init.router import router_weight
from nemo_upcycle.init.routers import inexact_in_float32
from nemo_upcycle.models.families import require_class
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.megatron_config import moe_fields, spec_fields
from nemo_upcycle.spec import ROUTER_KINDS, RouterKind
from tests.models import LLAMA3_8B


HIDDEN = 4096


def test_a_row_ignores_the_number_of_experts() -> None:
    few, many = UpcycleSpec(num_experts=4, top_k=2), UpcycleSpec(num_experts=64, top_k=2)
    for width in (97, HIDDEN):  # with an odd width, most rows are unaligned for vector instructions
        assert torch.equal(router_weight(few, 1, width), router_weight(many, 1, width)[:4])


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_mean_and_deviation_are_as_asked(kind: str, std: float) -> None:
    spec = UpcycleSpec(num_experts=16, top_k=2, router_init=kind, router_std=std)
    values = router_weight(spec, 0, HIDDEN).double()
    # For 65536 numbers, the error of the mean is std / 256, and the error of the deviation is at most std / 362. Allow
    # five times as much.
    assert abs(float(values.mean())) < 5 * std / 256
    assert float(values.std()) == pytest.approx(std, rel=5 / 362)
    per_expert = values.std(dim=1)
    assert float(per_expert.min()) == pytest.approx(std, rel=0.06)
    assert float(per_expert.max()) == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("granularity", [2, 3, 8])
def test_the_experts_of_one_copy_share_their_row(kind: str, granularity: int) -> None:
    spec = UpcycleSpec(num_experts=4 * granularity, top_k=granularity, granularity=granularity, router_init=kind)
    rows_cgD = router_weight(spec, 5, 96).view(4, granularity, 96)
    whole = UpcycleSpec(num_experts=4, top_k=2, router_init=kind)
    assert torch.equal(rows_cgD, router_weight(whole, 5, 96)[:, None].expand_as(rows_cgD))
    assert len({tuple(row.tolist()) for row in rows_cgD[:, 0]}) == 4


GRANULAR = {"num_experts": 8, "top_k": 4, "granularity": 2}
SIGMOID = {"router_score": "sigmoid"}
PROMPTS = {"router_init": "prompts", "calibration": "file", "router_std": 1000.0}


@pytest.mark.parametrize(
    ("fields", "width", "reasons"),
    [
        (GRANULAR | {"router_std": 0.0001}, 64, 1),
        (GRANULAR | {"router_std": 0.0001}, 10**8, 0),
        (GRANULAR | {"top_k": 8, "router_std": 1e-8}, 64, 0),
        ({"num_experts": 8, "router_std": 1e-8}, 64, 0),
        (SIGMOID | {"router_std": 1.0}, 64, 0),
        (SIGMOID | {"router_std": 1.0}, 4096, 1),
        (SIGMOID | {"router_init": "uniform", "router_std": 1.0}, 4096, 1),
        (SIGMOID | {"num_experts": 64, "router_std": 1000.0}, 4096, 0),
        (SIGMOID | {"router_init": "zero", "router_std": 1000.0}, 4096, 0),
        (GRANULAR | SIGMOID | {"router_std": 0.1}, 64, 0),
        (GRANULAR | SIGMOID | {"router_std": 0.1}, 4096, 1),
        (GRANULAR | SIGMOID | {"router_std": 1.0}, 4096, 2),
        (GRANULAR | SIGMOID | PROMPTS, 4096, 0),
        (GRANULAR | SIGMOID | PROMPTS | {"router_spread": 10.0}, 64, 1),
    ],
    ids=str,
)
def test_what_float32_loses_is_told(fields: dict[str, Any], width: int, reasons: int) -> None:
    assert len(inexact_in_float32(UpcycleSpec(**fields), width)) == reasons


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("normal", "6940a7263657d1304efda3188e5608e71ec466eb458eb8f73f93d0d74660fdce"),
        ("uniform", "342e272f168e231b016539a9751744233ae1abf0cd6d849b20eb70612eb5e19c"),
    ],
)
def test_bits_are_what_they_were(kind: str, digest: str) -> None:
    """Golden values: the same seed gives the same router in every future version."""
    spec = UpcycleSpec(num_experts=4, top_k=2, router_init=kind)
    routers_LED = torch.stack([router_weight(spec, layer, 64) for layer in range(4)])
    assert hashlib.sha256(routers_LED.numpy().tobytes()).hexdigest() == digest


class _Cubed(RouterKind):
    """A router score that the package does not have."""

    score, order, pre_softmax = "cubed", "topk_softmax", False

    def weight_sum(self, spec: UpcycleSpec) -> float:
        return 1.0


def test_a_new_kind_is_found_from_all_its_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, dense = _Cubed(), architecture_from_config(LLAMA3_8B)
    monkeypatch.setitem(ROUTER_KINDS, (kind.score, kind.order), kind)
    monkeypatch.setattr("nemo_upcycle.spec.ROUTER_SCORES", [kind.score])
    spec = UpcycleSpec(num_experts=4, router_score="cubed")
    moe_arch = dense.upcycled(spec)
    assert moe_arch.router_kind is spec.router_kind is kind
    with pytest.raises(SpecError, match="cubed scores"):
        require_class(moe_arch)
    settings = moe_fields(spec, dense.ffn_size, dense.num_layers)
    fields = spec_fields(settings, dense.ffn_size, dense.num_layers)
    assert UpcycleSpec(**{name: value for name, (_, value) in fields.items()}) == spec
    with pytest.raises(SpecError, match="'cubd' does not exist"):
        spec_fields(settings | {"moe_router_score_function": "cubd"}, dense.ffn_size, dense.num_layers)
