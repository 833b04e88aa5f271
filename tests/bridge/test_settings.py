"""What `config.upcycle` asks for: learning rates by part, an annealed balancing loss, spikes, evaluations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.pipeline.executors.ft import ft_command
from nemo_upcycle.trainers.schedules import Anneal, part_of
from nemo_upcycle.utils.files import read_json
from tests.bridge.runs import VOCABULARY, run_config
from tests.bridge.test_chain import TINY
from tests.distributed.ranks import run_ranks
from tests.functional.started import environment
from tests.functional.test_pipeline import run_in_own_process
from tests.functional.tiny import write_finished_inputs
from tests.models import write_llama
from tests.waiting import HANG_S


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tied Llama."""
    return write_llama(tmp_path_factory.mktemp("llama") / "dense", tied=True, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a parent, its tokenised texts and a suite."""
    return write_finished_inputs(tmp_path_factory.mktemp("inputs"))


def _train(
    dense: Path, folder: Path, settings: dict[str, Any], options: dict[str, Any], rate: float
) -> dict[str, Any]:
    """Train on this rank; return weights and biases after each step, and the coefficients that its routers had."""
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge.training.callbacks import Callback, CallbackContext
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain
    from megatron.core.transformer.moe.router import TopKRouter

    from nemo_upcycle.trainers.bridge.callbacks import upcycle_callbacks
    from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig
    from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start

    spec = UpcycleSpec(num_experts=4, top_k=2, method=options.pop("method", "copy"))
    config = UpcyclingConfig.of(run_config(dense, folder, spec, **options))
    config.optimizer.lr = config.optimizer.min_lr = rate
    config.checkpoint.save_interval = 2
    for name, value in settings.items():
        setattr(config.upcycle, name, value)
    upcycle_on_start(config, dense, spec)
    seen: dict[str, Any] = {"weights": [], "coefficients": [], "biases": []}

    class Watch(Callback):
        def _note(self, context: CallbackContext) -> None:
            named = [pair for chunk in context.model for pair in chunk.named_parameters()]
            seen["weights"].append({name: weight.detach().clone() for name, weight in named})
            buffers = [pair for chunk in context.model for pair in chunk.named_buffers()]
            seen["biases"].append({name: bias.clone() for name, bias in buffers if name.endswith("qb_beta")})

        def on_train_start(self, context: CallbackContext) -> None:
            self._note(context)

        def on_train_step_end(self, context: CallbackContext) -> None:
            self._note(context)
            modules = [module for chunk in context.model for module in chunk.modules()]
            routers = {module.config.moe_aux_loss_coeff for module in modules if isinstance(module, TopKRouter)}
            seen["coefficients"].append(routers)

    pretrain(config, forward_step, callbacks=[*upcycle_callbacks(config, folder), Watch()])
    return seen


def _trained(
    dense: Path, folder: Path, settings: dict[str, Any], ranks: int = 1, rate: float = 1e-3, **options: Any
) -> list[Any]:
    return run_ranks(_train, ranks, dense, folder, settings, options, rate, process_group=False)


def _moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], part: str) -> torch.Tensor:
    moves = [(after[name] - before[name]).flatten() for name in before if part_of(name) == part]
    return torch.cat(moves)


def test_the_first_step_of_each_part_is_scaled_by_its_factor(dense: Path, tmp_path: Path) -> None:
    (plain,) = _trained(dense, tmp_path / "plain", {})
    (scaled,) = _trained(dense, tmp_path / "scaled", {"router_lr_mult": 4.0, "expert_lr_mult": 0.5})
    for part, factor in (("router", 4.0), ("experts", 0.5), ("rest", 1.0)):
        one = _moved(*plain["weights"], part)
        assert one.abs().max() > 0
        torch.testing.assert_close(_moved(*scaled["weights"], part), factor * one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("freezes", "still"), [("experts", {"experts"}), ("all", {"experts", "rest"})])
def test_a_frozen_part_keeps_its_bits_until_the_warmup_ends(
    dense: Path, tmp_path: Path, freezes: str, still: set[str]
) -> None:
    settings = {"router_warmup_steps": 2, "router_warmup_freezes": freezes}
    for seen in _trained(dense, tmp_path / "run", settings, ranks=2, steps=3, ep=2):
        start, _, second, third = seen["weights"]
        for part in ("router", "experts", "rest"):
            assert bool(_moved(start, second, part).any()) == (part not in still)
            assert bool(_moved(second, third, part).any())


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(dense: Path, tmp_path: Path) -> None:
    settings = {"router_lr_mult": 4.0, "router_warmup_steps": 3, "aux_loss_steps": 4}
    (whole,) = _trained(dense, tmp_path / "whole", settings, steps=4)
    _trained(dense, tmp_path / "run", settings, steps=2)
    (resumed,) = _trained(dense, tmp_path / "run", settings, steps=4)
    assert len(resumed["weights"]) == 3
    for name, weight in whole["weights"][-1].items():
        assert torch.equal(weight, resumed["weights"][-1][name]), name


@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"pp": 2}], ids=str)
def test_routers_have_the_coefficient_of_the_step(dense: Path, tmp_path: Path, layout: dict[str, int]) -> None:
    settings, ranks = {"aux_loss_steps": 2, "aux_loss_end": 0.5}, 2 if layout else 1
    for seen in _trained(dense, tmp_path / "run", settings, ranks=ranks, steps=4, **layout):
        anneal = Anneal(start=seen["coefficients"][0].pop(), end=0.5, steps=2)
        assert anneal.start > 0
        assert [one.pop() for one in seen["coefficients"][1:]] == [anneal.at(step) for step in (1, 2, 3)]
    words = "aux_loss 0.01, to 0.5 in the first 2 steps (cosine)"
    assert read_json(tmp_path / "run/training.json")["balancing"] == words


@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2}], ids=["dp2", "ep2", "tp2"])
def test_a_dense_router_gradient_moves_the_routers_otherwise_and_keeps_the_first_loss(
    dense: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    moves, losses = [], []
    for value in (False, True):
        folder, options = tmp_path / str(value), {"method": "drop"} | layout  # copies give a router no gradient
        (seen, _) = _trained(dense, folder, {"dense_router_gradient": value}, ranks=2, **options)
        moves.append(_moved(*seen["weights"], "router"))
        losses.append(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"])
        assert ("dense_router_gradient" in read_json(folder / "training.json")) == value
    assert losses[0] == losses[1]
    assert (moves[0].sign() != moves[1].sign()).double().mean() > 0.05


def test_a_spike_ends_the_run_on_all_ranks_where_that_is_asked_for(dense: Path, tmp_path: Path) -> None:
    settings = {"spike_threshold": 0.0, "stop_on_spike": True}
    with pytest.raises(RuntimeError, match=r"loss of step \d+: got [\d.]+, expected at most"):
        _trained(dense, tmp_path / "run", settings, ranks=2, rate=0.0, steps=60, pp=2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    (spike,) = [line for line in lines if "loss_spike" in line]
    assert spike["loss_spike"] > spike["limit"]


def test_settings_without_the_callbacks_that_carry_them_out_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="a run without the callbacks"):
        run_ranks(_train_alone, 1, dense, tmp_path / "run", process_group=False)


def _train_alone(dense: Path, folder: Path) -> None:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from nemo_upcycle.trainers.bridge.settings import UpcyclingConfig
    from nemo_upcycle.trainers.bridge.upcycling import upcycle_on_start

    spec = UpcycleSpec(num_experts=4, top_k=2)
    config = UpcyclingConfig.of(run_config(dense, folder, spec))
    config.upcycle.router_lr_mult = 2.0
    upcycle_on_start(config, dense, spec)
    pretrain(config, forward_step)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("router_lr_mult", -1.0),
        ("router_warmup_freezes", "routers"),
        ("aux_loss_end", 0.1),
        ("spike_window", 0),
        ("evaluate_every", -5),
        ("evaluate_limit", 0),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(name: str, value: Any) -> None:
    from nemo_upcycle.trainers.bridge.settings import UpcycleSettings

    with pytest.raises(SpecError) as caught:
        UpcycleSettings(**{name: value}).check()
    assert caught.value.field == ("aux_loss_steps" if name == "aux_loss_end" else name)


def test_the_chain_takes_them_as_settings_of_a_stage(inputs: Path, tmp_path: Path) -> None:
    suite = f"upcycle.evaluate_suite={inputs / 'evaluation.yaml'}"
    training = _training("upcycle.router_lr_mult=4", "upcycle.evaluate_every=3", suite)
    facts = training.facts(str(inputs / "parent"))
    assert facts is not None
    assert facts.evaluations is not None
    assert facts.evaluations.every_n_steps == 3
    run_dir = tmp_path / "run"
    _plan(inputs, training).write(run_dir)
    for name in ("import", "data", "upcycle", "pretrain"):
        answer = run_in_own_process(name, run_dir, ranks=2 if name == "pretrain" else 1)
        assert answer.status == 0, answer.text
    assert read_json(run_dir / "pretrain/training.json")["lr_factors"]["router"] == 4
    lines = [json.loads(line) for line in (run_dir / "pretrain/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 3, 6]


def test_a_wrong_setting_is_told_in_the_words_of_the_command(inputs: Path) -> None:
    training = _training("upcycle.router_lr_mult=-1")
    with pytest.raises(UpcycleError) as caught:
        training.check_parent("pretrain", str(inputs / "parent"), remote=False)
    assert caught.value.field == "pretrain.upcycle.router_lr_mult"


def test_a_dense_router_gradient_is_planned_and_refused_before_anything_is_written(inputs: Path) -> None:
    words, dense = ("upcycle.dense_router_gradient=true",), str(inputs / "parent")
    facts = _training(*words).facts(dense)
    assert facts is not None
    assert facts.dense_router_gradient
    training = _training(*words, "model.moe_token_dispatcher_type=allgather")
    with pytest.raises(UpcycleError) as caught:
        training.check_parent("pretrain", dense, remote=False)
    assert caught.value.field == "pretrain.model.moe_token_dispatcher_type"


@pytest.mark.full
def test_a_hung_rank_is_restarted_and_the_run_ends_with_the_same_weights(inputs: Path, tmp_path: Path) -> None:
    from tests.bridge.test_upcycling import _export, _same_bits

    training, variables = _training(), environment() | {"GROUP_RANK": "0"}
    for folder, hangs in (("whole", False), ("hung", True)):
        run_dir = tmp_path / folder
        _plan(inputs, training).write(run_dir)
        for name in ("import", "data", "upcycle"):
            assert run_in_own_process(name, run_dir).status == 0
        words = (str(run_dir), str(tmp_path / "once") if hangs else "")
        command = ft_command(
            (sys.executable, "-m", "tests.bridge.ft_rank", *words),
            1,
            2,
            python=sys.executable,
            silence_s=20.0,
            save_s=60.0,
            restarts=2,
        )
        root = Path(__file__).parents[2]
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=HANG_S, env=variables, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        _export(inputs / "parent", run_dir / "pretrain/checkpoints", run_dir / "hf")
    assert (tmp_path / "once").exists()
    assert _same_bits(tmp_path / "whole/hf", tmp_path / "hung/hf")


def _training(*settings: str) -> Any:
    from nemo_upcycle.trainers.bridge.training import BridgeTraining

    return BridgeTraining(TINY, settings, nodes=1, ranks_per_node=2)


def _plan(inputs: Path, training: Any) -> Any:
    from nemo_upcycle.pipeline.stages import RunPlan

    named = [str(inputs / name) for name in ("parent", "blend", "evaluation.yaml")]
    return RunPlan(TINY, *named, training.to_text(), None, trainer="bridge")
