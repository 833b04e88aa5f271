"""The router's numbers: as wide as asked, different everywhere, the same for every layout."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.init.router import router_weight
from nemo_upcycle.models.families import require_class
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.megatron_config import moe_fields, spec_fields
from nemo_upcycle.spec import ROUTER_KINDS, RouterKind
from tests.models import LLAMA3_8B


HIDDEN = 4096


@pytest.mark.parametrize("kind", ["normal", "uniform", "zero"])
def test_the_routers_numbers_do_not_depend_on_what_was_drawn_before(kind: str) -> None:
    spec = UpcycleSpec(num_experts=8, top_k=2, router_init=kind)
    router_ED = router_weight(spec, 5, 96)
    assert router_ED.shape == (8, 96)
    assert router_ED.dtype == torch.float32
    torch.manual_seed(99)
    router_weight(spec, 4, 96)
    assert torch.equal(router_weight(spec, 5, 96), router_ED)


def test_a_row_does_not_depend_on_how_many_experts_there_are() -> None:
    few, many = UpcycleSpec(num_experts=4, top_k=2), UpcycleSpec(num_experts=64, top_k=2)
    for width in (97, HIDDEN):  # an odd width, too: no row begins where a vector of the processor does
        assert torch.equal(router_weight(few, 1, width), router_weight(many, 1, width)[:4])


@pytest.mark.parametrize("std", [0.02, 1.0])
@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_mean_and_deviation_are_as_asked(kind: str, std: float) -> None:
    spec = UpcycleSpec(num_experts=16, top_k=2, router_init=kind, router_std=std)
    values = router_weight(spec, 0, HIDDEN).double()
    # Of 65536 numbers the mean deviates by std / 256, the deviation by at most std / 362; five times that.
    assert abs(float(values.mean())) < 5 * std / 256
    assert float(values.std()) == pytest.approx(std, rel=5 / 362)
    per_expert = values.std(dim=1)
    assert float(per_expert.min()) == pytest.approx(std, rel=0.06)
    assert float(per_expert.max()) == pytest.approx(std, rel=0.06)


def test_normal_has_the_tails_of_a_normal_and_uniform_has_none() -> None:
    normal = router_weight(UpcycleSpec(num_experts=16, router_std=1.0), 0, HIDDEN)
    assert float((normal.abs() > 2).double().mean()) == pytest.approx(0.0455, abs=0.005)
    assert float(normal.abs().max()) > 3.5
    uniform = router_weight(UpcycleSpec(num_experts=16, router_init="uniform", router_std=1.0), 0, HIDDEN)
    bound = math.sqrt(3.0)
    assert float(uniform.abs().max()) <= bound
    assert float(uniform.max()) > 0.999 * bound
    assert float(uniform.min()) < -0.999 * bound


def test_zero_is_zero() -> None:
    assert not router_weight(UpcycleSpec(router_init="zero"), 3, HIDDEN).any()
    assert not router_weight(UpcycleSpec(router_std=0.0), 3, HIDDEN).any()


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_layers_experts_and_seeds_differ(kind: str) -> None:
    rows = [
        router_weight(UpcycleSpec(router_init=kind, seed=seed), layer, HIDDEN)[:3]
        for seed in (0, 1)
        for layer in (0, 1, 11)
    ]
    correlation = torch.corrcoef(torch.cat(rows).double())
    off_diagonal = correlation - torch.eye(len(correlation), dtype=torch.float64)
    assert float(off_diagonal.abs().max()) < 5 / math.sqrt(HIDDEN)


def test_names_do_not_run_into_each_other() -> None:
    """Layer 1 expert 11 and layer 11 expert 1 are two blocks."""
    spec = UpcycleSpec(num_experts=16)
    assert not torch.equal(router_weight(spec, 1, HIDDEN)[11], router_weight(spec, 11, HIDDEN)[1])


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("granularity", [2, 3, 8])
def test_the_experts_of_one_copy_share_their_row(kind: str, granularity: int) -> None:
    spec = UpcycleSpec(num_experts=4 * granularity, top_k=granularity, granularity=granularity, router_init=kind)
    rows_cgD = router_weight(spec, 5, 96).view(4, granularity, 96)
    whole = UpcycleSpec(num_experts=4, top_k=2, router_init=kind)
    assert torch.equal(rows_cgD, router_weight(whole, 5, 96)[:, None].expand_as(rows_cgD))
    assert len({tuple(row.tolist()) for row in rows_cgD[:, 0]}) == 4


def test_bits_are_what_they_were() -> None:
    """A golden value: the same seed gives the same router in every future version."""
    spec = UpcycleSpec(num_experts=4, top_k=2)
    routers_LED = torch.stack([router_weight(spec, layer, 64) for layer in range(4)])
    digest = hashlib.sha256(routers_LED.numpy().tobytes()).hexdigest()
    assert digest == "6940a7263657d1304efda3188e5608e71ec466eb458eb8f73f93d0d74660fdce"


class _Cubed(RouterKind):
    """A score that no kind of the package has."""

    score, order, pre_softmax = "cubed", "topk_softmax", False

    def weight_sum(self, spec: UpcycleSpec) -> float:
        return 1.0


def test_a_new_kind_is_found_from_spec_architecture_and_megatrons_settings(monkeypatch: pytest.MonkeyPatch) -> None:
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
