"""Tuning on packed conversations in Bridge, on real ranks: what the loss is of, layouts, the teacher, the chain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_upcycle.data.chat.build_chat import build_chat
from nemo_upcycle.data.chat.config import read_chat
from nemo_upcycle.data.chat.finished import PACKS
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.heldout import ANSWER_BITS
from nemo_upcycle.pipeline.checks import check_asked
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.files import read_json
from tests.bridge.recipes import BATCH, SEQUENCE
from tests.chats import sums, write_chat_tokenizer, write_lines
from tests.distributed.ranks import run_ranks
from tests.functional.test_pipeline import run_in_own_process, run_killed_in_training
from tests.functional.test_tuning import answer_losses
from tests.models import write_llama


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
RECIPES = "tests.bridge.recipes:"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A parent, and the packs of conversations for it."""
    folder = tmp_path_factory.mktemp("inputs")
    parent = write_chat_tokenizer(write_llama(folder / "parent", tied=True, vocab_size=260))  # which two ranks share
    lines = write_lines(folder / "sums.jsonl", sums(60))
    values = [f"tokenizer={parent}", f"seq_length={SEQUENCE}", "validation=0.1", "heldout=0.1"]
    build_chat(read_chat(lines, values), folder / "chat")
    return parent, folder / "chat"


@pytest.fixture(scope="module")
def one_rank(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _tune(inputs, tmp_path_factory.mktemp("one") / "run", "one_rank_sft")


def test_the_first_losses_are_the_parents_on_the_answers_of_each_conversation_alone(
    inputs: tuple[Path, Path], one_rank: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The parent in Hugging Face reads one conversation at a time, the upcycled model packs in NeMo's order."""
    parent, chat = inputs
    sums_of = np.array(answer_losses(parent, chat / PACKS["train"]))
    order = np.arange(len(sums_of))
    np.random.RandomState(read_json(chat / "manifest.json")["seed"]).shuffle(order)
    total, count = sums_of[order[:BATCH]].sum(0)
    assert one_rank[0]["loss"] == pytest.approx(total / count, abs=2e-5)
    still = _tune(
        inputs, tmp_path / "run", "one_rank_sft", "optimizer.lr=0", "optimizer.min_lr=0", "train.train_iters=1"
    )
    total, count = np.array(answer_losses(parent, chat / PACKS["validation"])).sum(0)
    assert still[-1]["validation_loss"] == pytest.approx(total / count, abs=2e-5)


@pytest.mark.parametrize(
    ("ranks", "recipe"),
    [(2, "tiny_sft"), (2, "tensor_parallel_sft"), (4, "pipeline_parallel_sft"), (2, "one_rank_sft")],
)
def test_losses_do_not_depend_on_the_layout(
    inputs: tuple[Path, Path], one_rank: list[dict[str, Any]], tmp_path: Path, ranks: int, recipe: str
) -> None:
    lines = _tune(inputs, tmp_path / "run", recipe, ranks=ranks)
    for name in ("loss", "validation_loss"):
        assert _values(lines, name) == pytest.approx(_values(one_rank, name), abs=2e-4), name
    assert _values(lines, "loss")[-1] < _values(lines, "loss")[0] - 0.1


def test_a_taught_model_starts_as_its_parent_and_stays_near_it(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    free, taught = (
        _tune(inputs, tmp_path / str(weight), "tiny_sft", f"upcycle.teacher_weight={weight}", ranks=2)
        for weight in (1e-9, 10.0)
    )
    terms = _values(taught, "teacher_kl")
    assert terms[0] == _values(free, "teacher_kl")[0] == pytest.approx(0.0, abs=1e-6)
    assert 0 < terms[-1] < 0.7 * _values(free, "teacher_kl")[-1]
    said = [read_json(tmp_path / "10.0" / name)["teacher"] for name in ("receipt.json", "training.json")]
    assert said[0] == said[1]
    assert (said[0]["weight"], said[0]["temperature"]) == (10.0, 1.0)


def test_a_teacher_of_texts_is_refused(inputs: tuple[Path, Path]) -> None:
    from nemo_upcycle.trainers.bridge.config import load_config
    from nemo_upcycle.trainers.bridge.finetuning import add_teacher

    config = load_config(f"{RECIPES}tiny", ["upcycle.teacher_weight=1.0"], inputs[0])
    with pytest.raises(UpcycleError, match="0 with BlendDataset"):
        add_teacher(config)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("train.micro_batch_size=2", "a micro batch is a pack"),
        ("model.context_parallel_size=2", "not cut for several ranks"),
        ("model.moe_router_load_balancing_type=seq_aux_loss", "no loss of single sequences"),
    ],
)
def test_settings_that_packs_do_not_take_are_refused(inputs: tuple[Path, Path], setting: str, match: str) -> None:
    with pytest.raises(UpcycleError, match=match):
        _training("tiny_sft", setting).check_parent("pretrain", str(inputs[0]), remote=False)


def test_a_chain_tunes_killed_in_the_middle_and_compares_four_models(
    inputs: tuple[Path, Path], tmp_path: Path
) -> None:
    finished, plain = (tmp_path / name for name in ("run", "plain"))
    _plan(inputs, tmp_path).write(finished)
    run_killed_in_training(finished, 4, ranks=2)
    results = read_json(finished / "results.json")
    bits = {name: values[ANSWER_BITS]["value"] for name, values in results["evaluation"].items()}
    assert bits["step0"] == pytest.approx(bits["dense"], abs=1e-4)
    assert bits["trained"] < bits["dense"]
    assert bits["dense_ct"] < bits["dense"]
    assert "conversations sums, " in (finished / "hf/README.md").read_text()
    assert results["training"]["pretrain"]["settings"]["data"].startswith("conversations sums, ")

    from tests.bridge.test_upcycling import _same_bits

    _plan(inputs, tmp_path).write(plain)
    for stage in ("import", "data", "upcycle", "pretrain", "dense_ct", "export"):
        answer = run_in_own_process(stage, plain, ranks=_ranks(stage))
        assert answer.status == 0, answer.text
    assert _same_bits(plain / "hf", finished / "hf")
    assert _same_bits(plain / "dense_ct/hf", finished / "dense_ct/hf")


def _plan(inputs: tuple[Path, Path], folder: Path) -> RunPlan:
    parent, _ = inputs
    (folder / "asked.yaml").write_text("tasks: {heldout_answers: [0]}\nlocal: true\nheldout: {answers: 8}\n")
    lines = parent.parent / "sums.jsonl"
    (folder / "sums.yaml").write_text(f"files: [{lines}]\nvalidation: 0.1\nheldout: 0.1\n")
    files = [str(folder / name) for name in ("sums.yaml", "asked.yaml")]
    trainings = [_training(name).to_text() for name in ("tiny_sft", "tiny_dense_sft")]
    plan = RunPlan("tiny", str(parent), *files, *trainings, trainer="bridge")
    assert plan.inputs.reads_chat
    check_asked(plan.inputs)
    return plan


def _ranks(stage: str) -> int:
    return 2 if stage in ("pretrain", "dense_ct") else 1


def _training(recipe: str, *settings: str, ranks: int = 2) -> Any:
    from nemo_upcycle.trainers.bridge.training import BridgeTraining

    return BridgeTraining(f"{RECIPES}{recipe}", settings, nodes=1, ranks_per_node=ranks)


def _tune(
    inputs: tuple[Path, Path], folder: Path, recipe: str, *settings: str, ranks: int = 1
) -> list[dict[str, Any]]:
    run_ranks(_train, ranks, _training(recipe, *settings, ranks=ranks).to_text(), folder, *inputs, process_group=False)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _train(text: str, folder: Path, parent: Path, chat: Path) -> None:
    from nemo_upcycle.trainers.bridge.training import BridgeTraining

    BridgeTraining.from_text(text).train(folder, parent, chat)


def _values(lines: list[dict[str, Any]], name: str) -> list[float]:
    return [line[name] for line in lines if name in line]
