"""The settings act in a real NeMo job: on weights, on float32 masters, in Megatron's router, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from nemo_upcycle.trainers.schedules import Anneal, part_of
from nemo_upcycle.utils.files import read_json
from tests.distributed.ranks import run_ranks
from tests.functional.runs import tiny_recipe
from tests.functional.tiny import BATCH, LAYERS, prepare


pytestmark = pytest.mark.slow
PEAK = 1e-3
#: Everything at once: the settings of the runs that stop and resume.
ALL = {
    "router_lr_mult": 4.0,
    "expert_lr_mult": 0.5,
    "router_warmup_steps": 3,
    "aux_loss_end": 0.002,
    "aux_loss_steps": 5,
}
ANNEAL = Anneal(start=0.01, end=0.002, steps=5)


class Recorder(pl.Callback):
    """Keeps weights and float32 masters of this rank, before and after every step, and what the routers used."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []
        self.masters: list[dict[str, torch.Tensor]] = []
        self.coefficients: dict[int, list[float]] = {}
        self.shown: dict[int, dict[str, float]] = {}
        self.rates: list[set[float]] = []

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        from megatron.core.transformer.moe import router

        balance = router.switch_load_balancing_loss_func

        def listen(**kwargs: Any) -> torch.Tensor:
            self.coefficients.setdefault(trainer.global_step, []).append(kwargs["moe_aux_loss_coeff"])
            return balance(**kwargs)

        router.switch_load_balancing_loss_func = listen
        self._keep(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        shown = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.shown[trainer.global_step - 1] = shown
        self.rates.append({group["lr"] for group in trainer.strategy.optimizers[0].param_groups})
        self._keep(trainer)

    def _keep(self, trainer: Any) -> None:
        named = dict(trainer.strategy.megatron_parallel.named_parameters())
        self.weights.append({name: param.detach().clone() for name, param in named.items()})
        names = {param: name for name, param in named.items()}
        masters = {}
        for part in trainer.strategy.optimizers[0].mcore_optimizer.chained_optimizers:
            for models, shards in zip(part.model_float16_groups, part.shard_fp32_from_float16_groups, strict=True):
                masters |= {names[model]: shard.clone() for model, shard in zip(models, shards, strict=True)}
        self.masters.append(masters)


def _rank(parent: str, data: str, folder: str, options: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Train the tiny recipe with `settings` for its optimizer; return what the recorder kept."""
    import fiddle as fdl

    from nemo_upcycle.trainers.nemo.optimizer import UpcycleOptimizer

    recipe = tiny_recipe(parent, data, folder, options)
    recipe.trainer.strategy.ddp.overlap_param_gather = False  # else other ranks' shards arrive one step later
    fdl.update_callable(recipe.optim, UpcycleOptimizer)
    for name, value in settings.items():
        setattr(recipe.optim, name, value)
    for name, value in options.get("adam", {}).items():
        setattr(recipe.optim.config, name, value)
    for name, value in options.get("model", {}).items():
        setattr(recipe.model.config, name, value)
    for name, value in options.get("spec", {}).items():
        setattr(recipe.resume.restore_config.spec, name, value)
    for name in ("warmup_steps", "constant_steps"):
        if name in options:
            setattr(recipe.optim.lr_scheduler, name, options[name])
    if not options.get("scheduler", True):
        recipe.optim.lr_scheduler = None
    if options.get("dense"):
        recipe.model.config.num_moe_experts, recipe.resume.restore_config.spec = None, None
    job = fdl.build(recipe)
    recorder = Recorder()
    job.keywords["trainer"].callbacks.append(recorder)
    job()
    return {
        "weights": recorder.weights,
        "masters": recorder.masters,
        "coefficients": recorder.coefficients,
        "shown": recorder.shown,
        "rates": recorder.rates,
    }


class Jobs:
    """Jobs of one parent on one blend."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent, self.data = prepare(folder)

    def train(self, name: str, world_size: int, settings: dict[str, Any], **options: Any) -> list[Any]:
        """Train, and return what each rank's recorder kept."""
        paths = (str(self.parent), str(self.data), str(self.folder / name))
        return run_ranks(_rank, world_size, *paths, options, settings, process_group=False)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(tmp_path_factory.mktemp("schedules"))


@pytest.fixture(scope="module")
def whole(jobs: Jobs) -> Any:
    """Six steps with all settings, a checkpoint every second step, never stopped."""
    (run,) = jobs.train("whole", 1, ALL, steps=6, every=2)
    return run


def _moved(states: list[dict[str, torch.Tensor]], step: int) -> dict[str, set[bool]]:
    """Return, for each part, whether its tensors moved in a step: {False} none, {True} every one."""
    moved: dict[str, set[bool]] = {}
    for name, before in states[step].items():
        moved.setdefault(part_of(name), set()).add(not torch.equal(before, states[step + 1][name]))
    return moved


@pytest.mark.parametrize(
    ("world_size", "options", "rate"),
    [
        (1, {"steps": 1}, PEAK / 3),  # the recipe warms up for two steps
        # NeMo's scheduler gives every group the rate of the first one when it has constant steps.
        pytest.param(1, {"steps": 3, "warmup_steps": 0, "constant_steps": 1}, PEAK, marks=pytest.mark.full),
        # nothing writes a group's rate anew after the step
        pytest.param(1, {"steps": 1, "scheduler": False}, PEAK, marks=pytest.mark.full),
        (2, {"steps": 1, "ep": 2}, PEAK / 3),
        pytest.param(4, {"steps": 1, "tp": 2, "pp": 2}, PEAK / 3, marks=pytest.mark.full),
    ],
    ids=["alone", "constant-steps", "no-scheduler", "ep2", "tp2-pp2"],
)
def test_multipliers_scale_the_first_update(
    jobs: Jobs, request: Any, world_size: int, options: dict[str, int], rate: float
) -> None:
    """Without decay and epsilon, Adam's first step moves each weight that has a gradient by the learning rate."""
    adam = {"weight_decay": 0.0, "adam_eps": 1e-20}
    settings = {"router_lr_mult": 4.0, "expert_lr_mult": 0.5}
    for run in jobs.train(request.node.callspec.id, world_size, settings, adam=adam, **options):
        before, after = run["weights"][:2]
        for part, factor in {"router": 4.0, "experts": 0.5, "rest": 1.0}.items():
            moves = torch.cat([(after[key] - before[key]).abs().flatten() for key in before if part_of(key) == part])
            assert (moves > 0).double().mean() > 0.5
            moves = moves[moves > 0]
            torch.testing.assert_close(moves, torch.full_like(moves, rate * factor), rtol=2e-3, atol=0)
        shown = [run["shown"][0][name] for name in ("lr", "lr_router", "lr_experts")]
        assert shown == pytest.approx([rate, 4 * rate, rate / 2])
        assert {len(rates) for rates in run["rates"]} == {1}  # outside the step no group has a rate of its own


@pytest.mark.parametrize(
    ("world_size", "freezes", "options"),
    [
        pytest.param(1, "experts", {}, marks=pytest.mark.full),
        pytest.param(1, "all", {}, marks=pytest.mark.full),
        pytest.param(2, "all", {"ep": 2, "precision": "bf16-mixed"}, marks=pytest.mark.full),
        (2, "experts", {"ep": 2, "precision": "bf16-mixed"}),
    ],
    ids=["experts", "all", "all-bf16-ep2", "experts-bf16-ep2"],
)
def test_frozen_parts_keep_their_bits_until_the_warmup_ends(
    jobs: Jobs, request: Any, world_size: int, freezes: str, options: dict[str, Any]
) -> None:
    settings = {"router_warmup_steps": 2, "router_warmup_freezes": freezes, "router_lr_mult": 10.0}
    runs = jobs.train(request.node.callspec.id, world_size, settings, steps=3, **options)
    kinds = ("weights", "masters") if "precision" in options else ("weights",)
    for run in runs:
        for kind in kinds:
            states = run[kind]
            for step in (0, 1):
                moved = _moved(states, step)
                assert moved["experts"] == {False}
                assert (True in moved["rest"]) == (freezes == "experts")
            after_warmup = _moved(states, 2)
            assert after_warmup["experts"] != {False}
            assert after_warmup["rest"] != {False}
    for step in (0, 1, 2):  # the distributed optimizer gives a router's master to one of the ranks
        assert any(True in _moved(run[kinds[-1]], step).get("router", ()) for run in runs)


def test_the_router_uses_the_scheduled_coefficient(whole: Any) -> None:
    for step in range(6):
        used = whole["coefficients"][step]
        assert len(used) == LAYERS * BATCH  # every layer, every micro-batch
        assert used == [pytest.approx(ANNEAL.at(step), rel=1e-12)] * len(used)
        assert whole["shown"][step]["aux_loss_coeff"] == pytest.approx(ANNEAL.at(step))


@pytest.mark.full
def test_a_killed_run_resumes_with_the_same_values(jobs: Jobs, whole: Any) -> None:
    """Killed after step 3, with the checkpoint of step 2 behind it: in the middle of the warm-up and of the anneal."""
    (run,) = _kill_and_resume(jobs, "killed", 1)
    _assert_goes_on(run, whole, "weights")


@pytest.mark.full
def test_ranks_that_hold_no_router_resume_too(jobs: Jobs) -> None:
    """With two data-parallel ranks, one of them has no share of the routers' masters: its group is empty."""
    options = {"ep": 2, "precision": "bf16-mixed"}
    wholes = jobs.train("whole-ep2", 2, ALL, steps=6, every=2, **options)
    held = [{part_of(name) for name in run["masters"][0]} for run in wholes]
    assert [part for part in held if "router" not in part]
    for run, whole in zip(_kill_and_resume(jobs, "killed-ep2", 2, **options), wholes, strict=True):
        _assert_goes_on(run, whole, "masters")


def _kill_and_resume(jobs: Jobs, name: str, world_size: int, **options: Any) -> list[Any]:
    with pytest.raises(RuntimeError, match=r"rank \d died"):
        jobs.train(name, world_size, ALL, steps=6, every=2, kill=3, **options)
    return jobs.train(name, world_size, ALL, steps=6, every=2, **options)


def _assert_goes_on(run: Any, whole: Any, kind: str) -> None:
    assert sorted(run["coefficients"]) == [2, 3, 4, 5]
    for step in (2, 3, 4, 5):
        assert run["coefficients"][step] == whole["coefficients"][step]
        assert run["shown"][step]["lr_experts"] == whole["shown"][step]["lr_experts"]
    assert [_moved(run[kind], step)["experts"] for step in (0, 1)] == [{False}, {True}]
    for resumed, expected in zip(run[kind], whole[kind][2:], strict=True):
        for name, weight in expected.items():
            torch.testing.assert_close(resumed[name], weight, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.full
def test_settings_may_change_when_a_run_resumes(jobs: Jobs, whole: Any) -> None:
    settings = {"router_lr_mult": 0.0, "expert_lr_mult": 2.0}
    (run,) = jobs.train("whole", 1, settings, steps=7, every=2)
    assert len(run["weights"]) == 2
    moved = _moved(run["weights"], 0)
    assert moved["router"] == {False}
    assert moved["experts"] == {True}
    assert set(run["coefficients"][6]) == {0.01}  # the model's own again


def test_a_checkpoint_records_nemos_own_optimizer(jobs: Jobs, whole: Any) -> None:
    from nemo import lightning as nl
    from nemo.lightning.io import load_context

    from nemo_upcycle.trainers.base import last_checkpoint

    model = load_context(last_checkpoint(jobs.folder / "whole") / "context", subpath="model")
    assert type(model.optim) is nl.MegatronOptimizerModule
    assert model.optim.config.lr == PEAK
    assert model.config.moe_aux_loss_coeff == 0.01


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"router_warmup_steps": 2}, {"dense": True}, ["router of the model", "got none"]),
        pytest.param(
            {"aux_loss_steps": 2},
            {"dense": True},
            ["optim.aux_loss_steps", "'none' balancing"],
            marks=pytest.mark.full,
        ),
        ({"aux_loss_steps": 2}, {"model": {"moe_router_load_balancing_type": "none"}}, ["'none' balancing"]),
        pytest.param(
            {"aux_loss_steps": 2, "aux_loss_end": 0.01},
            {"model": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.0}},
            ["start above 0"],
            marks=pytest.mark.full,
        ),
    ],
    ids=["dense-warmup", "dense-anneal", "no-loss", "global-from-zero"],
)
def test_settings_without_effect_are_refused(
    jobs: Jobs, request: Any, settings: dict[str, Any], options: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(RuntimeError) as raised:
        jobs.train(request.node.callspec.id, 1, settings, steps=1, **options)
    for word in ("SpecError", *words):
        assert word in str(raised.value)


def test_a_dense_router_gradient_moves_the_routers_otherwise_and_keeps_the_first_loss(jobs: Jobs) -> None:
    options = {"steps": 1, "ep": 2, "spec": {"method": "drop"}}  # copies give a router no gradient
    plain, dense = (
        jobs.train(f"gradient-{value}", 2, {"dense_router_gradient": value}, **options)[0] for value in (False, True)
    )
    assert dense["shown"][0]["reduced_train_loss"] == plain["shown"][0]["reduced_train_loss"]
    routers = [name for name in plain["weights"][0] if part_of(name) == "router"]
    starts, *ends = (
        [state[name] for name in routers] for state in (plain["weights"][0], plain["weights"][1], dense["weights"][1])
    )
    without, with_it = (torch.cat([(b - a).flatten() for a, b in zip(starts, end, strict=True)]) for end in ends)
    assert (without.sign() != with_it.sign()).double().mean() > 0.05
    settings = read_json(jobs.folder / "gradient-True/training.json")
    assert settings["dense_router_gradient"] is True
    assert "dense_router_gradient" not in read_json(jobs.folder / "gradient-False/training.json")


def test_what_stands_in_its_way_is_refused_before_the_job(jobs: Jobs) -> None:
    options = {"steps": 1, "model": {"moe_token_dispatcher_type": "allgather"}}
    with pytest.raises(RuntimeError, match="moe_token_dispatcher_type: got allgather, expected alltoall"):
        jobs.train("refused", 1, {"dense_router_gradient": True}, **options)
