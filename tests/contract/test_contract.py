"""The facts, settings and checks that the rest of the package asks of a training before it starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.pipeline.plan import open_training
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.trainers.base import Training
from nemo_upcycle.trainers.facts import Evaluations
from tests.contract.trainers import IS_BRIDGE, TRAINER, setting_name, training_text
from tests.functional.tiny import BATCH, EXPERTS, SEQUENCE, write_parent


pytestmark = pytest.mark.slow
SPEC = UpcycleSpec(num_experts=EXPERTS, top_k=2)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dense parent."""
    return write_parent(tmp_path_factory.mktemp("parent") / "dense", vocab_size=260)  # two ranks can share 260 rows


def _training(settings: dict[str, Any] | None = None, **options: Any) -> Training:
    return open_training(TRAINER, training_text(settings, **options))


def test_facts_are_those_of_the_training(parent: Path) -> None:
    training = _training({"tp": 2, "ep": 2}, ranks=4, evaluate={"suite": "watch", "every_n_steps": 3})
    facts = training.facts(Parent(str(parent)))
    assert facts is not None
    assert training.ranks == (1, 4)
    arch = read_architecture(parent).upcycled(SPEC)
    assert (facts.arch.total_params, facts.arch.active_params) == (arch.total_params, arch.active_params)
    layout = facts.layout
    assert (layout.gpus, layout.tp, layout.pp, layout.ep, layout.micro_batch) == (4, 2, 1, 2, 1)
    assert (facts.seq_length, facts.global_batch, facts.steps) == (SEQUENCE, BATCH, 6)
    assert facts.step_tokens == SEQUENCE * BATCH
    assert (facts.saving.every_n_steps, facts.saving.setting) == (2, setting_name("save_every"))
    assert (facts.profile.precision, facts.saving.weight_bytes) == ("32", 4)
    assert facts.evaluations == Evaluations(suite="watch", every_n_steps=3)
    assert not facts.rate.is_constant
    dense = _training(kind="dense_ct").facts(Parent(str(parent)))
    assert dense is not None
    assert (dense.arch.num_experts, dense.computation.capacity_factor, dense.evaluations) == (None, None, None)
    assert dense.checkpoint_bytes < facts.checkpoint_bytes


def test_a_training_tells_its_spec_and_data(parent: Path) -> None:
    training = _training({"spec.seed": 7})
    assert training.spec(parent) == UpcycleSpec(num_experts=EXPERTS, top_k=2, seed=7)
    assert training.seq_length(parent) == SEQUENCE
    experts = [training.model_config(parent, dense=dense).num_moe_experts for dense in (False, True)]
    assert experts == [EXPERTS, None]
    assert not training.reads_chat
    assert _training(kind="moe_sft").reads_chat


def test_settings_are_told_apart_by_what_the_result_depends_on(parent: Path) -> None:
    training = _training({"tp": 2, "lr": 5e-4, "spec.seed": 7}, ranks=2)
    found = training.settings()
    assert found.steps == 6
    assert {setting_name(name) for name in ("save_every", "tp")} <= found.free.keys()
    assert {setting_name(name) for name in ("lr", "spec.seed")} <= found.fixed.keys()
    assert setting_name("spec.seed") in found.step0
    shown = training.shown_settings(Parent(str(parent)))
    names = {"steps": 6, "save_every": 2, "tp": 2, "lr": 5e-4, "global_batch": BATCH, "seq_length": SEQUENCE}
    assert {name: shown[setting_name(name)] for name in names} == names


def _check(training: Training, stage: str, parent: Path) -> None:
    training.check(stage)
    training.check_parent(stage, Parent(str(parent)), remote=False)
    training.check_here(stage)


@pytest.mark.parametrize("kind", ["moe", "dense_ct", "moe_sft", "dense_sft"])
def test_what_is_right_is_accepted(parent: Path, kind: str) -> None:
    training, stage = _training(kind=kind, ranks=2), "pretrain" if "moe" in kind else "dense_ct"
    _check(training, stage, parent)
    assert training.problems(stage, Parent(str(parent))) == ()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"lr": 1e-7}, "min_lr"),
        ({"global_batch": 5}, "global_batch"),
        ({"tp": 4}, "tp"),
        ({"ep": 3}, "ep"),
        ({"model.moe_router_topk": 9}, "model.moe_router_topk"),
        ({"model.hidden_dropout": 1.0}, "model.hidden_dropout"),
        ({"model.mtp_num_layers": 1}, "model.mtp_num_layers"),
    ],
)
def test_what_is_wrong_is_refused_by_the_settings_name(parent: Path, settings: dict[str, Any], name: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        _check(_training(settings, ranks=2), "pretrain", parent)
    assert caught.value.parts[0].field == f"pretrain.{setting_name(name)}"


#: Settings with values that would end a job before its first step. Each dict has the settings of one training.
WRONG: list[dict[str, Any]]
#: Setting, value, and words of the trainer's own error.
FATAL: tuple[str, Any, str]
if IS_BRIDGE:
    WRONG = [
        {"validation.eval_iters": -1, "logger.log_interval": 0},
        {
            "model.recompute_granularity": "banana",
            "model.moe_router_dtype": "banana",
            "optimizer.optimizer": "banana",
            "tokenizer.tokenizer_type": "null",
        },
        {"model.rotary_base": 1, "model.layernorm_epsilon": 1},
    ]
    FATAL = ("model.moe_router_group_topk", 2, "moe_router_num_groups must be specified")
else:
    WRONG = [
        {
            "model.moe_router_dtype": "banana",
            "optim.config.optimizer": "banana",
            "trainer.accelerator": "tpu",
            "trainer.val_check_interval": 0,
            "trainer.log_every_n_steps": 0,
        },
        {"model.rotary_base": 1, "model.layernorm_epsilon": 1},
    ]
    FATAL = ("model.recompute_granularity", "banana", 'banana must be "full"or "selective".')


@pytest.mark.parametrize("settings", WRONG, ids=len)
def test_lists_wrong_values_together(parent: Path, settings: dict[str, Any]) -> None:
    problems = _training(settings, ranks=2).problems("pretrain", Parent(str(parent)))
    assert {error.field.partition(" ")[0] for error in problems} == {
        f"pretrain.{setting_name(name)}" for name in settings
    }


def test_shows_the_trainers_own_error_of_a_construction(parent: Path) -> None:
    name, value, words = FATAL
    (problem,) = _training({name: value}, ranks=2).problems("pretrain", Parent(str(parent)))
    assert str(problem).startswith("pretrain: the training cannot be constructed: ValueError: ")
    assert words in str(problem)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    "layout", [{"tp": 2, "pp": 2, "ep": 2}, {"pp": 4, "cp": 2}, {"tp": 2, "etp": 1, "ep": 8}], ids=str
)
def test_a_rank_of_each_stage_of_every_layout_is_constructed(parent: Path, layout: dict[str, int]) -> None:
    assert _training(layout, ranks=8).problems("pretrain", Parent(str(parent))) == ()
    (problem,) = _training({**layout, "model.layernorm_epsilon": 1}, ranks=8).problems("pretrain", Parent(str(parent)))
    assert problem.expected == "1e-05, as in the parent"


def test_facts_warn_of_likely_mistakes(parent: Path) -> None:
    facts = _training({"lr": 100.0, "warmup": 6}).facts(Parent(str(parent)))
    assert facts is not None
    high, unreached = facts.warnings
    assert "rises to 100" in high
    assert "never reaches its peak, 100: 6 steps of warm-up, 6 of training" in unreached
    longer = replace(facts, rate=replace(facts.rate, peak=1e-5), seq_length=facts.positions + 1)
    unreached, long = longer.warnings  # 1e-5 is not a high rate
    assert "more than the" in long


def test_a_baseline_is_no_upcycled_model(parent: Path) -> None:
    with pytest.raises(UpcycleError):
        _check(_training(kind="dense_ct"), "pretrain", parent)


#: Bridge gives routers no mask of padding tokens, so it refuses this loss.
OF_BRIDGE: dict[str, Any] = {"model.moe_router_load_balancing_type": "seq_aux_loss"}
OF_PACKS = {"micro_batch": 2, "cp": 2} | (OF_BRIDGE if IS_BRIDGE else {})


@pytest.mark.parametrize("name", OF_PACKS)
def test_what_packs_do_not_take_is_refused_by_name(parent: Path, name: str) -> None:
    with pytest.raises(UpcycleError) as caught:
        _check(_training({name: OF_PACKS[name]}, kind="moe_sft", ranks=2), "pretrain", parent)
    assert caught.value.field.endswith(setting_name(name).rpartition(".")[2])
