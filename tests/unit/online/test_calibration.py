"""The calibration pass over prompts: it sees the model's own activations, and threads do not change the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import CheckpointError, SpecError, UpcycleError
from nemo_upcycle.init.calibration_file import ROUTER, Calibration
from nemo_upcycle.models.hf_model import load_model
from nemo_upcycle.online.calibration import Sample, router_rows
from tests.models import write_llama, write_qwen3
from tests.unit.online.samples import made, random_sample


PROMPTS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "router_init": "prompts", "router_prompts": "file"}
WIDTH, COPIES = 32, 4


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("dense"), layers=3)


@pytest.mark.parametrize("write", [write_llama, write_qwen3])
def test_routers_come_from_the_inputs_of_the_networks(tmp_path: Path, write: Any) -> None:
    folder, sample = write(tmp_path / "dense", layers=3), random_sample(250, COPIES)
    report = made(folder, tmp_path / "file", UpcycleSpec(**PROMPTS, moe_layers="0,2"), sample)
    model, entered = load_model(folder, dtype=torch.float32).eval(), []
    for layer in (0, 2):
        hook = lambda _, args: entered.append(args[0].flatten(0, 1))  # noqa: E731
        model.model.layers[layer].mlp.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in sample.batches:
            model(batch)
    tensors = load_file(tmp_path / "file")
    assert tensors.keys() == {ROUTER.format(layer=layer) for layer in (0, 2)}
    for number, layer in enumerate((0, 2)):
        wanted = router_rows(entered[number::2], sample.labels, COPIES, map).float()
        torch.testing.assert_close(tensors[ROUTER.format(layer=layer)], wanted, rtol=1e-3, atol=1e-4)
    assert (report.layers, report.tokens) == (2, sample.tokens)
    assert Calibration(tmp_path / "file").lineage["data"] == sample.about


def test_rows_are_mean_directions_with_spread_one() -> None:
    batches = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) + 0.5 for n in (3, 5, 2, 4, 6)]
    rows_CD = router_rows(batches, [0, 1, 1, 2, 3], COPIES, map)
    means = [batches[0], torch.cat(batches[1:3]), batches[3], batches[4]]
    unit_CD = torch.stack([tokens.double().mean(0) / tokens.double().mean(0).norm() for tokens in means])
    logits_TC = torch.cat(batches).double() @ rows_CD.T
    assert float(logits_TC.var(1, correction=0).mean()) ** 0.5 == pytest.approx(1.0, rel=1e-5)
    assert float(rows_CD.mean(0).abs().max()) < 1e-9
    common_CD = unit_CD - unit_CD.mean(0)
    torch.testing.assert_close(rows_CD / rows_CD.norm(), common_CD / common_CD.norm())


@pytest.mark.parametrize("batches", [[torch.ones(3, WIDTH)] * COPIES, [torch.full((3, WIDTH), torch.nan)] * COPIES])
def test_rows_that_tell_nothing_apart_are_refused(batches: Any) -> None:
    with pytest.raises(UpcycleError, match="Router rows from the prompts are"):
        router_rows(batches, range(COPIES), COPIES, map)


def test_the_file_is_the_same_whatever_the_number_of_threads(dense: Path, tmp_path: Path) -> None:
    before, digests = torch.get_num_threads(), set()
    for count in (1, 3):
        torch.set_num_threads(count)
        digests.add(made(dense, tmp_path / f"{count}", UpcycleSpec(**PROMPTS)).sha256)
        assert torch.get_num_threads() == count
    torch.set_num_threads(before)
    assert len(digests) == 1


def test_a_file_of_other_settings_is_not_overwritten(dense: Path, tmp_path: Path) -> None:
    spec, file = UpcycleSpec(**PROMPTS), tmp_path / "file"
    first, again = made(dense, file, spec), made(dense, file, spec)
    assert (first.made, again.made, again.sha256) == (True, False, first.sha256)
    other = random_sample(250, COPIES, seed=7)
    with pytest.raises(UpcycleError, match="is a calibration file made with other settings"):
        made(dense, file, spec, other)
    assert made(dense, file, spec, other, replace=True).sha256 != first.sha256


@pytest.mark.parametrize(
    ("fields", "sample", "error", "field"),
    [
        ({"router_init": "normal", "router_prompts": ""}, None, SpecError, "router_init"),
        ({}, Sample((torch.full((1, 300), 250),), (0,), {}), CheckpointError, ""),
        ({"moe_layers": "7"}, None, SpecError, "moe_layers"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    dense: Path, tmp_path: Path, fields: Any, sample: Any, error: Any, field: str
) -> None:
    with pytest.raises(error) as refused:
        made(dense, tmp_path / "file", UpcycleSpec(**(PROMPTS | fields)), sample)
    assert (refused.value.field or "") == field
    assert not list(tmp_path.iterdir())
