"""Routers from data: what they are fitted to is what they tell apart, and their logits spread as said."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.init.calibration import LayerSample, scaled_rows
from nemo_upcycle.init.rng import block_generator
from nemo_upcycle.init.routers import CalibratedInit
from nemo_upcycle.spec import ROUTER_INITS


WIDTH, COPIES, TOKENS = 32, 4, 64


def _fitted(name: str, sample: LayerSample) -> torch.Tensor:
    init = ROUTER_INITS[name]
    assert isinstance(init, CalibratedInit)
    return init.fit(sample)


def _sample(batches: list[torch.Tensor], labels: list[int] | None = None, seed: int = 1) -> LayerSample:
    return LayerSample(batches, labels or [0] * len(batches), COPIES, block_generator(seed, "test"), map)


def _planted(noise: float = 0.2, common: float = 0.0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Return batches of activations of any length around four directions, one as often as all others, and whose."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.linalg.qr(torch.randn(WIDTH, COPIES, generator=generator)).Q.T
    whose = torch.tensor([0, 1, 0, 2, 0, 3] * (TOKENS // 2))
    tokens = directions[whose] + noise * torch.randn(len(whose), WIDTH, generator=generator) / WIDTH**0.5
    tokens += common * torch.ones(WIDTH) / WIDTH**0.5
    tokens *= torch.rand(len(whose), 1, generator=generator) * 5 + 0.1
    return list(tokens.split(TOKENS // 2)), whose


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("common", [0.0, 3.0])
def test_kmeans_separates_planted_clusters(seed: int, common: float) -> None:
    batches, whose = _planted(common=common)
    sample = _sample(batches, seed=seed)
    rows_CD = scaled_rows(_fitted("kmeans", sample), sample)
    chosen = (torch.cat(batches).double() @ rows_CD.T).argmax(1)
    pairs = {(int(a), int(b)) for a, b in zip(whose, chosen, strict=True)}
    assert len(pairs) == len({b for _, b in pairs}) == COPIES


def test_kmeans_gives_a_copy_without_a_token_one_that_fits_nowhere() -> None:
    same = torch.ones(TOKENS, WIDTH)
    other = torch.eye(WIDTH)[:3]
    rows_CD = _fitted("kmeans", _sample([same, other, same]))
    assert (
        torch.equal((other.double() @ rows_CD.T).argmax(1).sort().values.unique(), torch.arange(COPIES)[:3])
        or len({tuple(row.tolist()) for row in rows_CD}) == COPIES
    )


def test_ridge_is_the_closed_form_and_tells_the_sources_apart() -> None:
    batches, whose = _planted(noise=0.5)
    tokens = torch.cat(batches).double()
    sources = [tokens[whose == label].float() for label in range(COPIES)]
    batches, labels = [part for source in sources for part in source.split(16)], []
    for label, source in enumerate(sources):
        labels += [label] * len(source.split(16))
    rows_CD = _fitted("ridge", _sample(batches, labels))
    tokens = torch.cat(sources).double()
    wanted = torch.cat([torch.full((len(source),), label) for label, source in enumerate(sources)])
    penalty = 0.01 * float(tokens.square().sum()) / WIDTH
    moments = tokens.T @ tokens + penalty * torch.eye(WIDTH, dtype=torch.float64)
    solved = torch.linalg.solve(moments, tokens.T @ torch.nn.functional.one_hot(wanted).double()).T
    torch.testing.assert_close(rows_CD, solved, rtol=1e-4, atol=1e-7)
    assert float(((tokens @ rows_CD.T).argmax(1) == wanted).double().mean()) > 0.95


def test_prompts_are_the_directions_of_the_means() -> None:
    batches = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (3, 5, 2, 4, 6)]
    rows_CD = _fitted("prompts", _sample(batches, [0, 1, 1, 2, 3]))
    means = [batches[0], torch.cat(batches[1:3]), batches[3], batches[4]]
    for row, tokens in zip(rows_CD, means, strict=True):
        mean = tokens.double().mean(0)
        torch.testing.assert_close(row, mean / mean.norm())


@pytest.mark.parametrize("factor", [1e-3, 1.0, 50.0])
def test_scaled_rows_spread_by_one_and_have_nothing_in_common(factor: float) -> None:
    batches, _ = _planted(common=2.0)
    sample = _sample(batches)
    rows_CD = scaled_rows(_fitted("kmeans", sample) * factor + 7.0, sample)
    logits_TC = torch.cat(batches).double() @ rows_CD.T
    assert float(logits_TC.var(1, correction=0).mean()) ** 0.5 == pytest.approx(1.0, rel=1e-5)
    assert float(rows_CD.mean(0).abs().max()) < 1e-9


@pytest.mark.parametrize("rows", [torch.ones(COPIES, WIDTH), torch.full((COPIES, WIDTH), torch.nan)])
def test_rows_that_tell_nothing_apart_are_refused(rows: Any) -> None:
    with pytest.raises(UpcycleError, match="rows of a router from data"):
        scaled_rows(rows.double(), _sample(_planted()[0]))
