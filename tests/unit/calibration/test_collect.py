"""The pass over a sample: the activations of the model itself, the same file whatever the threads and the stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.calibration import collect
from nemo_upcycle.calibration.collect import Sample, calibrate
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.init.calibration import NEURONS, ROUTER, Calibration, LayerSample
from nemo_upcycle.init.coactivation import most_active
from nemo_upcycle.models.hf_model import load_model
from nemo_upcycle.utils.files import aside_of
from tests.models import write_llama, write_qwen3
from tests.unit.calibration.samples import made, random_sample


KMEANS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "router_init": "kmeans"}
BOTH: dict[str, Any] = KMEANS | {"num_experts": 8, "granularity": 4, "top_k": 4, "expert_split": "coactivation"}
BOTH |= {"num_experts": 16}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("dense"), layers=3)


def _seen(monkeypatch: pytest.MonkeyPatch) -> list[LayerSample]:
    """Note what routers are fitted to."""
    seen: list[LayerSample] = []
    kept = collect.scaled_rows

    def scaled(rows_CD: torch.Tensor, sample: LayerSample) -> torch.Tensor:
        seen.append(sample)
        return kept(rows_CD, sample)

    monkeypatch.setattr(collect, "scaled_rows", scaled)
    return seen


@pytest.mark.parametrize("write", [write_llama, write_qwen3])
def test_routers_are_fitted_to_what_enters_the_networks_of_the_model_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    folder, sample = write(tmp_path / "dense", layers=3), random_sample(250, (48,) * 6 + (80, 33))
    seen = _seen(monkeypatch)
    made(folder, tmp_path / "file", UpcycleSpec(**KMEANS, moe_layers="0,2"), sample)
    model, entered = load_model(folder, dtype=torch.float32).eval(), []
    for layer in (0, 2):
        hook = lambda _, args: entered.append(args[0].flatten(0, 1))  # noqa: E731
        model.model.layers[layer].mlp.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in sample.batches:
            model(batch)
    assert [len(one.batches) for one in seen] == [8, 8]
    for number, one in enumerate(seen):
        for found, wanted in zip(one.batches, entered[number::2], strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_the_file_is_the_same_whatever_the_number_of_threads(dense: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    digests = {made(dense, tmp_path / f"{n}", UpcycleSpec(**BOTH), threads=n).sha256 for n in (1, 3)}
    assert len(digests) == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("stop", [1, 2])
def test_a_stopped_pass_goes_on_and_leaves_the_same_file(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = made(dense, tmp_path / "whole", UpcycleSpec(**BOTH))
    computed, kept = [], collect._Pass._layer

    def layer(self: Any, number: int, *others: Any) -> Any:
        if number == stop and computed.count(stop) == 0:
            computed.append(number)
            raise KeyboardInterrupt
        computed.append(number)
        return kept(self, number, *others)

    monkeypatch.setattr(collect._Pass, "_layer", layer)
    with pytest.raises(KeyboardInterrupt):
        made(dense, tmp_path / "file", UpcycleSpec(**BOTH), save_every_s=0)
    assert not (tmp_path / "file").exists()
    assert made(dense, tmp_path / "file", UpcycleSpec(**BOTH)).sha256 == whole.sha256
    assert computed == [*range(stop + 1), *range(stop, 3)]
    assert not aside_of(tmp_path / "file").exists()


def test_work_of_other_settings_is_not_taken_up(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = collect._Pass._layer

    def layer(self: Any, number: int, *others: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return kept(self, number, *others)

    with monkeypatch.context() as patch:
        patch.setattr(collect._Pass, "_layer", layer)
        with pytest.raises(KeyboardInterrupt):
            made(dense, tmp_path / "file", UpcycleSpec(**KMEANS, seed=1), save_every_s=0)
    spec = UpcycleSpec(**KMEANS, seed=2)
    assert made(dense, tmp_path / "file", spec).sha256 == made(dense, tmp_path / "other", spec).sha256


def test_a_finished_file_is_found_and_one_of_other_settings_is_not_overwritten(dense: Path, tmp_path: Path) -> None:
    spec, file = UpcycleSpec(**KMEANS), tmp_path / "file"
    first = made(dense, file, spec)
    again = made(dense, file, spec)
    assert (first.made, again.made, again.sha256) == (True, False, first.sha256)
    other = UpcycleSpec(**KMEANS, seed=7)
    with pytest.raises(UpcycleError, match="a calibration of other settings"):
        made(dense, file, other)
    assert made(dense, file, other, replace=True).sha256 != first.sha256


def test_the_file_has_the_moe_layers_and_says_what_it_is_of(dense: Path, tmp_path: Path) -> None:
    report = made(dense, tmp_path / "file", UpcycleSpec(**BOTH, moe_layers="1,2"))
    tensors, lineage = load_file(tmp_path / "file"), Calibration(tmp_path / "file").lineage
    names = {name.format(layer=layer) for name in (ROUTER, NEURONS) for layer in (1, 2)}
    assert tensors.keys() == names
    assert tensors[ROUTER.format(layer=1)].shape == (4, 64)
    assert sorted(tensors[NEURONS.format(layer=2)].tolist()) == list(range(96))
    assert (report.layers, report.tokens) == (2, 576)
    assert lineage["data"] == {"random": [64] * 9}
    assert lineage["settings"]["seed"] == 1234
    assert lineage["within"].keys() == {"1", "2"}
    assert all(by_data > consecutive for by_data, consecutive in lineage["within"].values())


def test_seeds_and_layers_have_other_routers(dense: Path, tmp_path: Path) -> None:
    for seed in (1, 2):
        made(dense, tmp_path / f"{seed}", UpcycleSpec(**KMEANS, seed=seed))
    rows = [Calibration(tmp_path / f"{seed}").router(layer) for seed in (1, 2) for layer in (0, 1)]
    assert len({tuple(row.flatten().tolist()) for row in rows}) == 4


@pytest.mark.parametrize(
    ("fields", "sample", "error", "words"),
    [
        ({"router_init": "normal"}, None, SpecError, "router_init: got normal, expected router_init=kmeans, ridge"),
        ({}, random_sample(250, (48,)), UpcycleError, "tokens of the sample: got 48, expected 256 or more"),
        ({}, Sample((torch.full((1, 300), 250),), (0,), {}), CheckpointError, "got token 250, expected numbers below"),
        ({"num_experts": 8, "granularity": 5, "top_k": 5}, None, SpecError, "num_experts"),
        ({"moe_layers": "7"}, None, SpecError, "moe_layers: got 7, expected 0 to 2"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    dense: Path, tmp_path: Path, fields: Any, sample: Any, error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        made(dense, tmp_path / "file", UpcycleSpec(**(KMEANS | fields)), sample)
    assert not list(tmp_path.iterdir())


def test_rows_that_are_the_same_for_all_copies_are_refused(dense: Path, tmp_path: Path) -> None:
    spec = UpcycleSpec(**KMEANS)
    same = Sample((torch.full((1, 1), 5),) * 256, (0,) * 256, {})
    with open_dense(dense) as source, pytest.raises(UpcycleError, match="the same for all copies"):
        calibrate(source, tmp_path / "file", spec, same)


def test_the_most_active_tenth_of_the_neurons_is_marked() -> None:
    activations_NF = torch.arange(40.0).view(2, 20) * torch.tensor([1.0, -1.0]).repeat(10)
    assert most_active(activations_NF).nonzero().tolist() == [[0, 18], [0, 19], [1, 18], [1, 19]]
