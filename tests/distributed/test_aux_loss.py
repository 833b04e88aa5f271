"""What a coefficient of an auxiliary loss does to the routers is the same on every layout: gradients against one rank.

Real Megatron models, schedules, gradient buffers and gloo groups. The language model's loss is multiplied by zero, so
what arrives at the routers' weights is the gradient of the auxiliary losses alone. Every layout cuts the batch into
the same cells (one micro-batch of one data-parallel rank), because a balancing loss is no sum over tokens.

Attention without Transformer Engine knows no context parallelism. Its output projection is zero here, so that each
token goes its own way, wherever it is computed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, upcycle_into
from tests.distributed.ranks import run_ranks
from tests.functional.tiny import prepare, shrink
from tests.models import MemorySource, build_chunks, moe_settings, sample_tokens, small_architecture
from tests.tiers import quick


ARCH = small_architecture(num_layers=4)
SPEC = UpcycleSpec(num_experts=4, top_k=2, router_std=0.5)
#: Sequences of a cell, tokens of a sequence, cells of a step.
BATCH, LENGTH, CELLS = 2, 8, 4
LAYOUTS: dict[str, dict[str, int]] = {
    "dp4": {},
    "tp2 dp2, ep2": {"tp": 2, "ep": 2},
    "cp2 dp2, ep4": {"cp": 2, "ep": 4},
    "cp4": {"cp": 4},
    "tp2 cp2": {"tp": 2, "cp": 2},
    "pp2 cp2": {"pp": 2, "cp": 2},
    "pp2 vp2 cp2": {"pp": 2, "vp": 2, "cp": 2},
}
#: The layout of a Megatron that scales by itself, and the one of `make test`.
NEWER, QUICK = "cp2 dp2, ep4", "tp2 cp2"
_EVERY_LOSS: dict[str, Any] = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.01, 0.03],
    "moe_z_loss_coeff": 0.02,
}
CASES: dict[str, dict[str, Any]] = {
    "every loss": _EVERY_LOSS,
    "per token": {**_EVERY_LOSS, "calculate_per_token_loss": True},
    "global": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.01},
}
LOSS_SCALE = 1024.0  # of FP16


def _gradients(layout: str, settings: dict[str, Any], micro_batches: int, corrected: bool) -> dict[str, Any]:
    """Take one step; return the gradients of this rank's routers by layer, and what is said to act."""
    from megatron.core import parallel_state as ps
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer.moe.router import TopKRouter

    from nemo_upcycle.trainers.nemo.aux_loss import act_as_set

    chunks = build_chunks(ARCH, layout=LAYOUTS.get(layout), **moe_settings(ARCH, SPEC) | settings)
    upcycle_into(chunks, MemorySource(ARCH), SPEC)
    for chunk in chunks:
        chunk.rotary_pos_emb.cp_group = None
        for name, parameter in chunk.named_parameters():
            if "linear_proj" in name:
                parameter.data.zero_()
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = lambda loss: LOSS_SCALE * loss
    acting = act_as_set(config) if corrected else []
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    tokens = sample_tokens(ARCH.vocab_size, BATCH * CELLS, LENGTH)
    tokens = tokens.chunk(ps.get_context_parallel_world_size(), dim=1)[ps.get_context_parallel_rank()]
    replicas, replica = ps.get_data_parallel_world_size(), ps.get_data_parallel_rank()
    batches = [batch.chunk(replicas)[replica] for batch in tokens.chunk(micro_batches)]
    get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in wrapped],
        model=wrapped,
        num_microbatches=micro_batches,
        seq_length=LENGTH,
        micro_batch_size=len(batches[0]),
    )
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    return {
        "layers": {router.layer_number: router.weight.main_grad / LOSS_SCALE for router in routers},
        "acting": acting,
    }


def _forward_step(batches: Any, model: torch.nn.Module) -> Any:
    tokens = next(batches)
    length = tokens.shape[1]
    output = model(tokens, torch.arange(length)[None], torch.ones(1, 1, length, length).triu(1).bool(), labels=tokens)

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        return 0.0 * losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), {}

    return output, loss


def _alone() -> dict[tuple[str, int], torch.Tensor]:
    """Return the gradients of one rank, for each case and number of micro-batches."""
    found = {}
    for micro_batches in (1, 2, 4):
        for case, settings in CASES.items():
            layers = _gradients("alone", settings, micro_batches, corrected=False)["layers"]
            found[case, micro_batches] = torch.stack([layers[layer] for layer in sorted(layers)])
    return found


def _together(layout: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what one of four ranks finds for each case: Megatron as it is, a newer one, and ours."""
    from megatron.core import parallel_state as ps
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    megatrons = MoEAuxLossAutoScaler.set_loss_scale
    micro_batches = CELLS // _size(layout, "dp")
    found = {}
    for case, settings in CASES.items():
        MoEAuxLossAutoScaler.set_loss_scale = staticmethod(megatrons)
        if case != "global":
            found[case, "Megatron's"] = _gradients(layout, settings, micro_batches, corrected=False)
        found[case, "ours"] = _gradients(layout, settings, micro_batches, corrected=True)
    if layout == NEWER:

        def newer(scale: torch.Tensor) -> None:
            megatrons(scale * ps.get_context_parallel_world_size())

        MoEAuxLossAutoScaler.set_loss_scale = staticmethod(newer)
        found["every loss", "newer"] = _gradients(layout, _EVERY_LOSS, micro_batches, corrected=True)
        found["every loss", "newer"]["kept"] = MoEAuxLossAutoScaler.set_loss_scale is newer
    return found


def _size(layout: str, axis: str) -> int:
    """Return the size of an axis of a layout on four ranks."""
    sizes = LAYOUTS[layout]
    if axis == "dp":
        return 4 // (sizes.get("tp", 1) * sizes.get("cp", 1) * sizes.get("pp", 1))
    return sizes.get(axis, 1)


class Gradients:
    """The routers' gradients, on one rank and on four."""

    def __init__(self) -> None:
        (self.alone,) = run_ranks(_alone, 1)
        self._found: dict[str, list[Any]] = {}

    def ranks(self, layout: str) -> list[dict[tuple[str, str], dict[str, Any]]]:
        """Return what each of four ranks finds under a layout."""
        if layout not in self._found:
            self._found[layout] = run_ranks(_together, 4, layout)
        return self._found[layout]

    def share(self, layout: str, case: str, version: str) -> float:
        """Return the gradients over those of one rank, which must point the same way."""
        whole: dict[int, torch.Tensor] = {}
        for rank in self.ranks(layout):
            for layer, gradient in rank[case, version]["layers"].items():
                torch.testing.assert_close(gradient, whole.setdefault(layer, gradient), rtol=1e-5, atol=1e-9)
        got = torch.stack([whole[layer] for layer in sorted(whole)])
        expected = self.alone[case, CELLS // _size(layout, "dp") if case == "global" else CELLS]
        share = float((got * expected).sum() / expected.square().sum())
        assert float((got - share * expected).norm() / got.norm()) < 1e-5
        return share


@pytest.fixture(scope="module")
def gradients() -> Gradients:
    return Gradients()


@pytest.mark.parametrize("layout", quick(LAYOUTS, QUICK))
@pytest.mark.parametrize("case", ["every loss", "per token"])
def test_coefficients_act_as_set_on_every_layout(gradients: Gradients, layout: str, case: str) -> None:
    assert gradients.share(layout, case, "ours") == pytest.approx(1.0, rel=1e-5)
    for rank in gradients.ranks(layout):
        acting = {loss.name: (loss.coefficient, loss.acting) for loss in rank[case, "ours"]["acting"]}
        assert acting == {"aux_loss": (0.01, 0.01), "seq_aux_loss": (0.03, 0.03), "z_loss": (0.02, 0.02)}


@pytest.mark.parametrize("layout", quick(LAYOUTS, QUICK))
@pytest.mark.parametrize("case", ["every loss", "per token"])
def test_megatron_015_divides_by_the_context_parallel_size(gradients: Gradients, layout: str, case: str) -> None:
    """The fault that is corrected, as long as it is there: with tokens counted, the tensor-parallel size as well."""
    divided_by = _size(layout, "cp") * (_size(layout, "tp") if case == "per token" else 1)
    assert gradients.share(layout, case, "Megatron's") == pytest.approx(1 / divided_by, rel=1e-5)
    (first, *_) = gradients.ranks(layout)[0][case, "ours"]["acting"]
    assert (f"divides it by {divided_by} " in first.why) == (divided_by > 1)
    assert (first.why == "as set") == (divided_by == 1)


@pytest.mark.parametrize("layout", quick(LAYOUTS, QUICK))
def test_global_aux_loss_acts_divided_by_the_data_parallel_size(gradients: Gradients, layout: str) -> None:
    replicas = _size(layout, "dp")
    assert gradients.share(layout, "global", "ours") == pytest.approx(1 / replicas, rel=1e-5)
    (loss,) = gradients.ranks(layout)[0]["global", "ours"]["acting"]
    assert (loss.name, loss.coefficient, loss.acting) == ("global_aux_loss", 0.01, pytest.approx(0.01 / replicas))
    assert (f"data-parallel size, {replicas}" in loss.why) == (replicas > 1)


@pytest.mark.full
def test_a_megatron_that_scales_by_context_parallel_size_is_not_changed(gradients: Gradients) -> None:
    assert gradients.share(NEWER, "every loss", "newer") == pytest.approx(1.0, rel=1e-5)
    assert all(rank["every loss", "newer"]["kept"] for rank in gradients.ranks(NEWER))


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
