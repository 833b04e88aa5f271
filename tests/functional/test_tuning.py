"""Tuning on packed conversations in NeMo, on real ranks: what the loss is of, layouts, a resume, another start."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.convert.export import export_checkpoint
from nemo_upcycle.data.chat.build_chat import build_chat
from nemo_upcycle.data.chat.config import read_chat
from nemo_upcycle.errors import SpecError
from nemo_upcycle.evaluation.heldout import ANSWER_BITS
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.pipeline.checks import check_asked
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.planning.memory import lora_params
from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint, model_prefix
from nemo_upcycle.sources.megatron_checkpoint import model_tensors
from nemo_upcycle.trainers.base import last_checkpoint
from nemo_upcycle.utils.files import read_json
from tests.chats import sums, write_chat_tokenizer, write_lines
from tests.distributed.ranks import run_ranks
from tests.functional.test_pipeline import run_killed_in_training
from tests.functional.tiny import SEQUENCE, write_parent
from tests.tiers import quick


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent, and the packs of conversations for it."""
    folder = tmp_path_factory.mktemp("inputs")
    parent = write_chat_tokenizer(write_parent(folder / "parent"))
    lines = write_lines(folder / "sums.jsonl", sums(60))
    values = [f"tokenizer={parent}", f"seq_length={SEQUENCE}", "validation=0.1", "heldout=0.1"]
    build_chat(read_chat(lines, values), folder / "chat")
    return parent, folder / "chat"


def test_the_first_loss_is_the_parents_on_the_answers_of_each_conversation_alone(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    """The parent in Hugging Face reads one conversation at a time; the upcycled model reads packs of several."""
    parent, chat = inputs
    lines = _train(inputs, tmp_path / "run", 1, steps=1, validate=True, vocabulary=259)  # without rows of padding
    first = next(line["validation_loss"] for line in lines if line["step"] == 0)
    total, count = np.array(answer_losses(parent, chat / "validation.npy")).sum(0)
    assert first == pytest.approx(total / count, abs=2e-5)


@pytest.mark.parametrize("divided", quick(["ep", "tp", "pp", "data"], "ep"))
def test_losses_do_not_depend_on_the_layout(
    inputs: tuple[Path, Path], one_rank: list[float], tmp_path: Path, divided: str
) -> None:
    layout = {} if divided == "data" else {divided: 2}
    losses = [line["loss"] for line in _train(inputs, tmp_path / "run", 2, steps=4, **layout)]
    assert losses == pytest.approx(one_rank, abs=2e-4)
    assert losses[-1] < losses[0] - 0.1


@pytest.fixture(scope="module")
def one_rank(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return [line["loss"] for line in _train(inputs, tmp_path_factory.mktemp("one") / "run", 1, steps=4)]


@pytest.mark.full
def test_a_resumed_tuning_ends_with_the_same_bits(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    _train(inputs, tmp_path / "whole", 1, steps=4, every=2)
    with pytest.raises(RuntimeError, match="rank 0 died"):
        _train(inputs, tmp_path / "parts", 1, steps=4, every=2, kill=3)
    _train(inputs, tmp_path / "parts", 1, steps=4, every=2)
    assert _differing(tmp_path / "whole", tmp_path / "parts") == []


#: Of LoRA's run: without rows of padding, which no exported model has.
_ADAPTED: dict[str, Any] = {"steps": 4, "vocabulary": 259, "validate": True, "lora": 4}


@pytest.fixture(scope="module")
def adapted(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run of LoRA that nothing stopped, and its metrics."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    return folder, _train(inputs, folder, 1, every=2, **_ADAPTED)


def test_lora_trains_adapters_and_routers_and_keeps_all_other_bits(
    inputs: tuple[Path, Path], adapted: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, lines = adapted
    _train(inputs, tmp_path / "before", 1, every=1, steps=1, vocabulary=259, frozen=True)
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[-1] < losses[0] - 0.02
    assert read_json(folder / "training.json")["lora"] == {"rank": 4, "alpha": 8}
    before, after = (DistributedCheckpoint(last_checkpoint(one) / "weights") for one in (tmp_path / "before", folder))
    names, kept = ({*model_tensors(one, model_prefix(one))} for one in (after, before))
    changed = [name for name in kept if not torch.equal(before.read(name), after.read(name))]
    assert changed
    assert all(".mlp.router." in name for name in changed)
    adapters = names - kept
    assert all(".adapter." in name and after.read(name).abs().max() > 0 for name in adapters)
    modules = {name.partition(".adapter.")[0].rpartition(".")[2] for name in adapters}
    assert modules == {"linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"}
    arch = read_architecture(inputs[0]).upcycled(UpcycleSpec(num_experts=8, top_k=2))
    routers = sum(math.prod(before.shape(name)) for name in kept if ".mlp.router." in name)
    assert (sum(math.prod(after.shape(name)) for name in adapters), routers) == lora_params(arch, 4)


def test_an_export_adds_loras_adapters_up(
    inputs: tuple[Path, Path], adapted: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Hugging Face computes with the exported weights what Megatron did with the adapters."""
    folder, lines = adapted
    spec = UpcycleSpec(num_experts=8, top_k=2)
    export_checkpoint(last_checkpoint(folder), inputs[0], tmp_path / "hf", spec=spec, dtype=torch.float32)
    last = next(line["validation_loss"] for line in reversed(lines) if "validation_loss" in line)
    total, count = np.array(answer_losses(tmp_path / "hf", inputs[1] / "validation.npy")).sum(0)
    assert total / count == pytest.approx(last, abs=2e-5)


@pytest.mark.full
def test_a_resumed_lora_ends_with_the_same_bits(
    inputs: tuple[Path, Path], adapted: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="rank 0 died"):
        _train(inputs, tmp_path / "parts", 1, every=2, kill=3, **_ADAPTED)
    _train(inputs, tmp_path / "parts", 1, every=2, **_ADAPTED)
    assert _differing(adapted[0], tmp_path / "parts") == []


@pytest.mark.full
@pytest.mark.parametrize("change", ["data", "pp", "recompute"])
def test_loras_losses_do_not_depend_on_the_layout_or_on_what_is_recomputed(
    inputs: tuple[Path, Path], adapted: tuple[Path, list[dict[str, Any]]], tmp_path: Path, change: str
) -> None:
    ranks, pp = 1 if change == "recompute" else 2, 2 if change == "pp" else 1
    lines = _train(inputs, tmp_path / "run", ranks, recompute=change == "recompute", pp=pp, **_ADAPTED)
    changed, usual = ([line["loss"] for line in one if "loss" in line] for one in (lines, adapted[1]))
    equal = 1 if change == "pp" else 4  # each stage draws adapters of its own, which add nothing at first
    assert changed[:equal] == pytest.approx(usual[:equal], abs=2e-4)
    assert changed[-1] < changed[0] - 0.5


def test_a_start_from_loras_checkpoint_is_refused(
    inputs: tuple[Path, Path], adapted: tuple[Path, list[dict[str, Any]]]
) -> None:
    from nemo_upcycle.trainers.nemo.upcycling import UpcycleConfig

    with pytest.raises(SpecError, match="LoRA") as caught:
        UpcycleConfig(path=str(inputs[0]), checkpoint=str(adapted[0]))
    assert caught.value.field == "checkpoint"


@pytest.mark.parametrize("model", quick(["moe", "dense"], "moe"))
def test_a_tuning_starts_from_what_another_training_left(
    inputs: tuple[Path, Path], tmp_path: Path, model: str
) -> None:
    dense = model == "dense"
    _train(inputs, tmp_path / "first", 1, steps=2, every=2, dense=dense)
    _train(inputs, tmp_path / "second", 1, steps=1, every=1, dense=dense, start=str(tmp_path / "first"), frozen=True)
    assert _differing(tmp_path / "first", tmp_path / "second") == []
    assert not (tmp_path / "second/receipt.json").exists()


@pytest.mark.full
def test_a_chain_tunes_killed_in_the_middle_and_compares_four_models(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    from nemo_upcycle.recipes import smollm2_135m_dense_sft, smollm2_135m_e8t2_sft
    from nemo_upcycle.trainers.nemo.recipes import dump_recipe
    from tests.functional.tiny import shrink

    parent, _ = inputs
    trainings = [
        dump_recipe(shrink(module.finetune_recipe(), max_steps=6, checkpoint_every=2))
        for module in (smollm2_135m_e8t2_sft, smollm2_135m_dense_sft)
    ]
    (tmp_path / "asked.yaml").write_text("tasks: {heldout_answers: [0]}\nlocal: true\nheldout: {answers: 8}\n")
    set_of = "files: [FILE]\nvalidation: 0.1\nheldout: 0.1\n".replace("FILE", str(parent.parent / "sums.jsonl"))
    (tmp_path / "sums.yaml").write_text(set_of)
    files = [str(tmp_path / name) for name in ("sums.yaml", "asked.yaml")]
    plan = RunPlan("tiny", str(parent), *files, *trainings)
    check_asked(plan.inputs)
    plan.write(tmp_path / "run")
    run_killed_in_training(tmp_path / "run", 3)
    results = read_json(tmp_path / "run/results.json")
    bits = {name: values[ANSWER_BITS]["value"] for name, values in results["evaluation"].items()}
    assert bits["step0"] == pytest.approx(bits["dense"], abs=1e-4)
    assert bits["trained"] < bits["dense"]
    assert bits["dense_ct"] < bits["dense"]
    assert results["paired"]["trained_minus_dense_ct"][ANSWER_BITS]["clusters"] >= 5
    assert "conversations sums, " in (tmp_path / "run/hf/README.md").read_text()
    assert "bits per byte of held-out answers" in (tmp_path / "run/report.md").read_text()


def _train(inputs: tuple[Path, Path], folder: Path, ranks: int, **options: Any) -> list[dict[str, Any]]:
    run_ranks(_tune, ranks, *map(str, inputs), str(folder), options, process_group=False)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _tune(parent: str, chat: str, folder: str, options: dict[str, Any]) -> None:
    import os

    import fiddle as fdl
    import nemo.utils
    import nemo_run as run

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.recipes import smollm2_135m_dense_sft, smollm2_135m_e8t2_sft
    from nemo_upcycle.trainers.nemo.checks import check_recipe
    from nemo_upcycle.trainers.nemo.recipes import place_recipe
    from tests.functional.runs import Kill
    from tests.functional.tiny import shrink

    use_cpu_backend()
    nemo.utils.logging.set_verbosity(nemo.utils.logging.ERROR)
    module = smollm2_135m_dense_sft if options.get("dense") else smollm2_135m_e8t2_sft
    recipe = module.finetune_recipe(num_gpus_per_node=int(os.environ["WORLD_SIZE"]), start=options.get("start"))
    shrink(recipe, max_steps=options["steps"], checkpoint_every=options.get("every"))
    if "vocabulary" in options:
        recipe.model.config.make_vocab_size_divisible_by = options["vocabulary"]
    if "lora" in options:
        from nemo_upcycle.recipes.tuning import with_lora

        with_lora(recipe, options["lora"])
        recipe.optim.config.lr = 1e-2
    if options.get("recompute"):
        config = recipe.model.config
        config.recompute_granularity, config.recompute_method, config.recompute_num_layers = "full", "uniform", 1
    if "kill" in options:
        recipe.trainer.callbacks.append(run.Config(Kill, step=options["kill"]))
    if options.get("validate"):
        trainer = recipe.trainer
        trainer.limit_val_batches, trainer.val_check_interval, trainer.num_sanity_val_steps = 1.0, 1, 1
    if options.get("frozen"):
        recipe.optim.config.lr = recipe.optim.lr_scheduler.min_lr = 0.0
    strategy = recipe.trainer.strategy
    strategy.expert_model_parallel_size = options.get("ep", 1)
    strategy.tensor_model_parallel_size = options.get("tp", 1)
    strategy.sequence_parallel = options.get("tp", 1) > 1
    strategy.pipeline_model_parallel_size = options.get("pp", 1)
    place_recipe(recipe, Path(folder), Path(parent), Path(chat))
    check_recipe(recipe)
    fdl.build(recipe)()


@torch.no_grad()
def answer_losses(parent: Path, packs: Path) -> list[tuple[float, int]]:
    """Return the loss of a parent in transformers, which reads one conversation at a time.

    Args:
        parent: its folder.
        packs: of conversations.

    Returns:
        For each pack the sum over the tokens that count, and how many these are.
    """
    from nemo_upcycle.models.hf_model import load_model

    model, found = load_model(parent, dtype=torch.float32).eval(), []
    for row in np.load(packs, allow_pickle=True):
        total, count = 0.0, 0
        borders = [*row["seq_start_id"], len(row["input_ids"])]
        for begin, end in itertools.pairwise(borders):
            ids = torch.from_numpy(row["input_ids"][begin:end].astype(np.int64))
            scored = torch.from_numpy(row["loss_mask"][begin : end - 1].astype(bool))
            losses = torch.nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total, count = total + float(losses[scored].sum()), count + int(scored.sum())
        found.append((total, count))
    return found


def _differing(one: Path, other: Path) -> list[str]:
    first, second = (DistributedCheckpoint(last_checkpoint(folder) / "weights") for folder in (one, other))
    names = [name for name in first.names() if not name.startswith("optimizer.")]
    assert names
    return [name for name in names if not torch.equal(first.read(name), second.read(name))]
