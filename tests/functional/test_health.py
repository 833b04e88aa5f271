"""Router health and throughput in real NeMo jobs: the same numbers on every layout, and no rank waits for another."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from tests.functional.runs import Runs, tiny_recipe
from tests.functional.tiny import BATCH, EXPERTS, LAYERS, SEQUENCE


pytestmark = [pytest.mark.slow, pytest.mark.full]
TOP_K, STEPS = 2, 3
PER_STEP = {"load_min", "load_max", "load_cv", "load_entropy", "dead_experts", "dropped", "load_balancing_loss"}


class Witness(pl.Callback):
    """Counts the decisions of one rank's routers independently, and records which layers recompute."""

    def __init__(self) -> None:
        self.slots: list[torch.Tensor] = []
        self.first: list[list[int]] = []
        self.losses: list[float] = []
        self.recomputed: list[bool] = []
        self._routed: list[tuple[int, torch.Tensor]] = []
        self._balanced: list[float] = []

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        from megatron.core.transformer.moe import router

        balance = router.switch_load_balancing_loss_func

        def listen(**kwargs: Any) -> torch.Tensor:
            loss = balance(**kwargs)
            self._balanced.append(float(loss) / kwargs["moe_aux_loss_coeff"])
            return loss

        router.switch_load_balancing_loss_func = listen
        self._layers = [module for module in trainer.strategy.megatron_parallel.modules() if hasattr(module, "router")]
        for layer, module in enumerate(self._layers):
            module.router.register_forward_hook(lambda *call, layer=layer: self._routed.append((layer, call[-1][1])))

    def on_train_batch_end(self, *_: Any) -> None:
        counts_LE = torch.zeros(LAYERS, EXPERTS)
        for layer, map_TE in self._routed:
            counts_LE[layer] += map_TE.sum(dim=0)
        if not self.slots:
            self.first = [map_TE.sum(dim=0).tolist() for layer, map_TE in self._routed if layer == 0]
        self.slots.append(counts_LE)
        self.losses.append(sum(self._balanced) / len(self._balanced))
        self.recomputed.append(all(layer.moe_layer_recompute for layer in self._layers))
        self._routed.clear()
        self._balanced.clear()


def _rank(parent: str, data: str, folder: str, options: dict[str, Any]) -> Any:
    """Train the demo's recipe, shrunk, and return the witness's records."""
    import fiddle as fdl
    import nemo_run as run
    from lightning.pytorch.loggers import TensorBoardLogger

    from nemo_upcycle.recipes import use_spec
    from nemo_upcycle.spec import UpcycleSpec
    from nemo_upcycle.trainers.nemo.checks import check_recipe
    from nemo_upcycle.trainers.recipe_arguments import adjust

    recipe = tiny_recipe(parent, data, folder, {"steps": STEPS, **options})
    recipe.trainer.strategy.ddp.overlap_param_gather = False  # otherwise a sample may hold the previous step's weights
    recipe.log.tensorboard = run.Config(TensorBoardLogger, save_dir="board", name="board")
    if moe_layers := options.get("moe_layers"):
        use_spec(recipe, UpcycleSpec(moe_layers=moe_layers))
    adjust(recipe, **options.get("adjust", {}))
    check_recipe(recipe)
    job, witness = fdl.build(recipe), Witness()
    if options.get("witness"):
        job.keywords["trainer"].callbacks.append(witness)
    job()
    return {name: getattr(witness, name) for name in ("slots", "first", "losses", "recomputed")}


class Jobs(Runs):
    """Runs in which a witness watches the first rank."""

    def watched(self, name: str, world_size: int = 1, **options: Any) -> tuple[list[dict[str, Any]], Any]:
        """Train; return the lines of the metrics and the first rank's records."""
        seen = self._run(_rank, name, world_size, options)
        return self.metrics(name), seen[0]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("health"))


@pytest.fixture(scope="module")
def alone(jobs: Jobs) -> tuple[list[dict[str, Any]], Any]:
    return jobs.watched("alone", witness=True)


def test_counts_and_losses_match_what_the_routers_decide(alone: tuple[list[dict[str, Any]], Any]) -> None:
    lines, seen = alone
    assert len(lines) == len(seen["slots"]) == STEPS
    for line, slots_LE, loss in zip(lines, seen["slots"], seen["losses"], strict=True):
        assert float(slots_LE.sum()) == LAYERS * BATCH * SEQUENCE * TOP_K
        for shares, counts_E, low, high in zip(
            line["expert_load"], slots_LE, line["router"]["load_min"], line["router"]["load_max"], strict=True
        ):
            expected = (counts_E / counts_E.sum()).tolist()
            assert shares == pytest.approx(expected, abs=1e-5)
            assert (low, high) == pytest.approx((min(expected), max(expected)), abs=1e-5)
        assert sum(line["router"]["load_balancing_loss"]) / LAYERS == pytest.approx(loss, rel=1e-4)
        assert line["router"]["dropped"] == [0.0] * LAYERS
    experts_known = [set(line["router"]) - PER_STEP for line in lines]
    assert experts_known == [{"expert_distance"}, set(), {"expert_distance"}]
    first, last = lines[0]["router"]["expert_distance"], lines[-1]["router"]["expert_distance"]
    assert all(0 < before < after < 1 for before, after in zip(first, last, strict=True))


def test_a_pipeline_stage_without_routers_blocks_no_rank(jobs: Jobs) -> None:
    """The second pipeline stage has only dense layers: it reports nothing, but takes part in the exchange."""
    lines, _ = jobs.watched("dense-stage", 2, pp=2, moe_layers=[0, 1])
    assert len(lines) == STEPS
    for line in lines:
        for values in line["router"].values():
            assert values[2:] == [None, None]
            assert None not in values[:2]
        assert line["expert_load"][2:] == [[0.0] * EXPERTS] * 2


def test_recomputation_ends_in_time_and_counts_once(jobs: Jobs, alone: tuple[list[dict[str, Any]], Any]) -> None:
    lines, seen = jobs.watched("recompute", adjust={"recompute_moe_steps": 2}, witness=True)
    assert seen["recomputed"] == [True, True, False]
    for got, expected in zip(lines, alone[0], strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert got["expert_load"] == expected["expert_load"]
        assert got["router"] == expected["router"]


def test_padding_does_not_count_as_load(jobs: Jobs, alone: tuple[list[dict[str, Any]], Any]) -> None:
    dropping, _ = jobs.watched("dropping", adjust={"capacity_factor": 0.5})
    padded, _ = jobs.watched("padded", adjust={"capacity_factor": 0.5, "pad_to_capacity": True})
    for got, expected in zip(padded, dropping, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["router"]["dropped"] == pytest.approx(expected["router"]["dropped"], abs=5e-3)
    # Nothing is dropped before the first router, so its demand is the same as without a capacity.
    capacity = SEQUENCE * TOP_K // EXPERTS // 2
    kept = sum(min(wanted, capacity) for micro_batch in alone[1]["first"] for wanted in micro_batch)
    assert dropping[0]["router"]["dropped"][0] == pytest.approx(1 - kept / (BATCH * SEQUENCE * TOP_K), abs=1e-6)
    assert min(dropping[0]["router"]["dropped"]) > 0.2


def test_tensorboard_gets_rates_and_router_health(jobs: Jobs, alone: tuple[list[dict[str, Any]], Any]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = next((jobs.folder / "alone").rglob("events.out.tfevents.*"))
    board = EventAccumulator(str(events))
    board.Reload()
    tags = set(board.Tags()["scalars"])
    assert {"tokens_per_s", "tflops_per_gpu/full", "tflops_per_gpu/causal", "memory_gib"} <= tags
    assert {f"router/{name}" for name in PER_STEP | {"expert_distance"}} <= tags
    assert {f"router_layers/load_cv/{layer:03d}" for layer in range(LAYERS)} <= tags
    logged = [event.value for event in board.Scalars("router_layers/load_cv/003")]
    assert logged == pytest.approx([line["router"]["load_cv"][3] for line in alone[0]], abs=1e-6)
