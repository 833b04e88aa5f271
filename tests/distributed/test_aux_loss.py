"""What a coefficient of an auxiliary loss does to the routers is the same on every layout: gradients against one rank.

See `router_step.py`; with Megatron-Core 0.15 and with Bridge's.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.router_step import CELLS, IS_015, LAYOUTS, QUICK, by_layer, size, take_step
from tests.functional.tiny import prepare, shrink
from tests.tiers import quick


#: The layout of a Megatron that scales by itself.
NEWER = "cp2 dp2, ep4"
_EVERY_LOSS: dict[str, Any] = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.01, 0.03],
    "moe_z_loss_coeff": 0.02,
}
#: Of the global batch, so with fewer and larger micro-batches on one rank: those of all data-parallel ranks together.
_GLOBAL: dict[str, Any] = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.01}
CASES: dict[str, dict[str, Any]] = {
    "every loss": _EVERY_LOSS,
    "per token": {**_EVERY_LOSS, "calculate_per_token_loss": True},
    "global": _GLOBAL,
    "global per token": {**_GLOBAL, "calculate_per_token_loss": True},
}
SET = {
    "every loss": {"aux_loss": 0.01, "seq_aux_loss": 0.03, "z_loss": 0.02},
    "global": {"global_aux_loss": 0.01},
}
#: In router health.
SHOWN = {
    "every loss": ["load_balancing_loss", "seq_load_balancing_loss", "z_loss"],
    "global": ["global_load_balancing_loss"],
}


def _kind(case: str) -> str:
    return "global" if case.startswith("global") else "every loss"


def _alone() -> dict[tuple[str, int], dict[str, Any]]:
    """Return the step of one rank, for each case and number of micro-batches."""
    return {
        (case, micro_batches): take_step("alone", settings, micro_batches, corrected=False)
        for micro_batches in (1, 2, 4)
        for case, settings in CASES.items()
    }


def _together(layout: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what one of four ranks finds for each case: Megatron as it is, a newer one, and ours."""
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
    from megatron.core.transformer.moe.router import TopKRouter

    megatrons, asked = MoEAuxLossAutoScaler.set_loss_scale, TopKRouter.get_aux_loss_coeff
    micro_batches = CELLS // size(layout, "dp")
    found = {}
    for case, settings in CASES.items():
        MoEAuxLossAutoScaler.set_loss_scale, TopKRouter.get_aux_loss_coeff = staticmethod(megatrons), asked
        found[case, "Megatron's"] = take_step(layout, settings, micro_batches, corrected=False)
        found[case, "ours"] = take_step(layout, settings, micro_batches)
    if layout == NEWER and IS_015:

        def newer(scale: Any) -> None:
            megatrons(scale * ps.get_context_parallel_world_size())

        MoEAuxLossAutoScaler.set_loss_scale = staticmethod(newer)
        found["every loss", "newer"] = take_step(layout, _EVERY_LOSS, micro_batches)
        found["every loss", "newer"]["kept"] = MoEAuxLossAutoScaler.set_loss_scale is newer
    return found


class Steps:
    """The steps of one rank and of four."""

    def __init__(self) -> None:
        (self._alone,) = run_ranks(_alone, 1)
        self._found: dict[str, list[Any]] = {}

    def alone(self, layout: str, case: str) -> dict[str, Any]:
        """Return what one rank finds in the same cells."""
        return self._alone[case, CELLS // size(layout, "dp") if _kind(case) == "global" else CELLS]

    def ranks(self, layout: str, case: str, version: str) -> list[dict[str, Any]]:
        """Return what each of four ranks finds under a layout."""
        if layout not in self._found:
            self._found[layout] = run_ranks(_together, 4, layout)
        return [rank[case, version] for rank in self._found[layout]]

    def share(self, layout: str, case: str, version: str) -> float:
        """Return the gradients over those of one rank, which must point the same way."""
        got = by_layer(self.ranks(layout, case, version), "gradients")
        expected = by_layer([self.alone(layout, case)], "gradients")
        share = float((got * expected).sum() / expected.square().sum())
        assert float((got - share * expected).norm() / got.norm()) < 1e-5
        return share


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps()


@pytest.mark.parametrize("layout", quick(LAYOUTS, *QUICK))
@pytest.mark.parametrize("case", CASES)
def test_coefficients_act_as_set_on_every_layout(steps: Steps, layout: str, case: str) -> None:
    assert steps.share(layout, case, "ours") == pytest.approx(1.0, rel=1e-5)
    for rank in steps.ranks(layout, case, "ours"):
        acting = {loss.name: (loss.coefficient, loss.acting) for loss in rank["acting"]}
        assert acting == {name: (value, value) for name, value in SET[_kind(case)].items()}


@pytest.mark.parametrize("layout", quick(LAYOUTS, *QUICK))
@pytest.mark.parametrize("case", CASES)
def test_megatron_alone_divides_them_by_sizes_of_the_layout(steps: Steps, layout: str, case: str) -> None:
    """The faults that are corrected, as long as they are there; the receipt names what is undone."""
    divided_by = size(layout, "dp") if _kind(case) == "global" else 1
    if IS_015:
        divided_by *= size(layout, "cp") * (size(layout, "tp") if case.endswith("per token") else 1)
    assert steps.share(layout, case, "Megatron's") == pytest.approx(1 / divided_by, rel=1e-5)
    first = steps.ranks(layout, case, "ours")[0]["acting"][0]
    assert (f"divides it by {divided_by} " in first.why) == (divided_by > 1)
    assert (first.why == "as set") == (divided_by == 1)


@pytest.mark.parametrize("layout", quick(LAYOUTS, *QUICK))
@pytest.mark.parametrize("case", CASES)
def test_router_health_shows_the_losses_of_one_rank(steps: Steps, layout: str, case: str) -> None:
    got, expected = steps.ranks(layout, case, "ours")[0]["health"], steps.alone(layout, case)["health"]
    for name in SHOWN[_kind(case)]:
        assert got[name] == pytest.approx(expected[name], rel=1e-4)
        assert all(value > 0.5 for value in got[name])
    assert got["load_max"] == pytest.approx(expected["load_max"], abs=1e-6)


@pytest.mark.full
@pytest.mark.skipif(not IS_015, reason="this Megatron does")
def test_a_megatron_that_scales_by_context_parallel_size_is_not_changed(steps: Steps) -> None:
    assert steps.share(NEWER, "every loss", "newer") == pytest.approx(1.0, rel=1e-5)
    assert all(rank["kept"] for rank in steps.ranks(NEWER, "every loss", "newer"))


def _train(parent: str, data: str, folder: str, tensor_parallelism: int) -> None:
    """Train the demo's recipe, cut down: tokens counted, a balancing loss that outweighs the rest and is annealed."""
    import fiddle as fdl
    import nemo.utils

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.recipes import smollm2_135m_e8t2
    from nemo_upcycle.trainers.nemo.recipes import place_recipe

    use_cpu_backend()
    nemo.utils.logging.set_verbosity(nemo.utils.logging.ERROR)
    recipe = smollm2_135m_e8t2.pretrain_recipe(num_gpus_per_node=int(os.environ["WORLD_SIZE"]), expert_parallelism=1)
    shrink(recipe, max_steps=3, checkpoint_every=None)
    recipe.model.config.calculate_per_token_loss = True
    recipe.model.config.moe_aux_loss_coeff = 5.0
    recipe.optim.aux_loss_end, recipe.optim.aux_loss_steps = 2.0, 2
    strategy = recipe.trainer.strategy
    strategy.tensor_model_parallel_size, strategy.sequence_parallel = tensor_parallelism, tensor_parallelism > 1
    strategy.ddp.average_in_collective = False  # Megatron counts tokens instead
    place_recipe(recipe, Path(folder), Path(parent), Path(data))
    fdl.build(recipe)()


@pytest.mark.full
@pytest.mark.skipif(find_spec("nemo") is None, reason="it trains in NeMo")
def test_a_recipe_on_two_ranks_trains_as_on_one_and_its_receipt_says_what_acts(tmp_path: Path) -> None:
    """With tokens counted, Megatron loses the tensor-parallel size; context parallelism has no attention here."""
    folders = [str(folder) for folder in prepare(tmp_path)]
    lines, receipts = {}, {}
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        run_ranks(_train, ranks, *folders, str(run), ranks, process_group=False)
        lines[ranks] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (receipts[ranks],) = json.loads((run / "receipt.json").read_text())["auxiliary_losses"]
    assert len(lines[1]) == 3
    for got, expected in zip(lines[2], lines[1], strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    assert receipts[1] == {"name": "aux_loss", "coefficient": 5.0, "acting": 5.0, "why": "as set"}
    assert (receipts[2]["coefficient"], receipts[2]["acting"]) == (5.0, 5.0)
    assert "divides it by 2 on this layout" in receipts[2]["why"]
