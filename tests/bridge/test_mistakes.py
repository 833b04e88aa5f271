"""Mistakes of `nemo upcycle pipeline` beside Megatron-Bridge: one line each, status 2, before anything is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.functional.tiny import write_finished_inputs
from tests.functional.typed import Answer, type_commands


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
SMALL = "smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config"
TINY, DENSE_CT = "recipe=tests.bridge.recipes:tiny gpus=2", "tests.bridge.recipes:tiny_dense_ct"
#: What is typed -> words of the answer.
MISTAKES = {
    f"recipe={SMALL[:-6]}cfg": f"Did you mean '{SMALL}'?",
    "recipe=tests.bridge.recipes:tini gpus=2": "recipe: got tests.bridge.recipes:tini, expected a function",
    "recipe=tests.bridge.recipes:_tiny gpus=2": "missing a required argument: 'spec'",
    "recipe=tests.bridge.recipes:builder gpus=1": "got UpcycledModelConfig, expected a provider",
    "recipe=tests.bridge.recipes:random gpus=2": "expected upcycle_on_start in it",
    f"recipe={DENSE_CT} gpus=2": f"recipe: got {DENSE_CT}, expected an upcycled model's",
    f"{TINY} dense_ct=tests.bridge.recipes:tiny": "dense_ct: got tests.bridge.recipes:tiny, expected a dense model's",
    "recipe=tests.bridge.recipes:tiny": "gpus: got None, expected how many ranks train",
    "recipe=tests.bridge.recipes:tiny gpus=12": "gpus: got 12, expected a multiple of gpus_per_node (8)",
    "recipe=tests.bridge.recipes:tiny gpus=16": "expected those of this machine",
    "recipe=tests.bridge.recipes:tiny gpus=3": "got 2, expected a divisor of the GPUs (3)",
    f"{TINY} pretrain.train.train_itres=4": "train.train_itres=4: ",
    f"{TINY} pretrain.train.train_iters=few": "train.train_iters: got 'few', expected a number",
    f"{TINY} pretrain.model.moe_router_topk=1": "moe_router_topk: got 1, expected 2",
    f"{TINY} pretrain.dataset.seq_length=32": "pretrain.model.seq_length: got 64, expected dataset.seq_length, 32",
    f"{TINY} dense_ct.train.train_iters=4": "got no recipe of a dense baseline",
    f"{TINY} pretrain.checkpoint.save=/elsewhere": "checkpoint.save: got checkpoint.save=/elsewhere, expected no",
    f"{TINY} pretrain.++checkpoint.load=/elsewhere": "checkpoint.load: got ++checkpoint.load=/elsewhere",
    f"{TINY} pretrain.++train.train_iters=few": "train.train_iters: got 'few'",
    f"{TINY} pretrain.model.tensor_model_parallel_size=0": "model.tensor_model_parallel_size",
    f"{TINY} gpus_per_node=0": "gpus_per_node: got 0, expected a whole number, 1 or more",
    f"{TINY} --detach": "--detach: got an executor that needs the launcher",
    f"{TINY} --render out": "--render: got no cluster",
    f"{TINY} recip=x": "'recip'",
    f"{TINY} dense=/nope": "model '/nope': got no such folder",
    f"{TINY} data=/nope": "blend '/nope'",
    # a parent that is fetched before it can be opened
    "--factory smollm2_135m_e8t2 pretrain.train.train_itres=4": "train.train_itres=4: ",
    f"dense=asset://smollm2-135m recipe={SMALL.replace('e8t2', 'dense_ct')}": "expected an upcycled model's",
    f"{TINY} evaluation=dmo": "Did you mean 'demo'?",
    f"{TINY} trained_on=lots": "trained_on: got 'lots', expected a number: 100B",
    f"{TINY} --from evaluate": "expected done, before 'evaluate'",
}
DRYRUN = f"{TINY} dense_ct={DENSE_CT} --dryrun"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a parent, its tokenised texts and a suite."""
    return write_finished_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def answers(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the command answers to every mistake; the process imports Bridge once."""
    named = {"dense": files / "parent", "data": files / "blend", "evaluation": files / "evaluation.yaml"}
    commands = []
    for typed in (*MISTAKES, DRYRUN):
        own = ["dense="] if "--factory" in typed else []
        given = [f"{name}={path}" for name, path in named.items() if f"{name}=" not in typed and f"{name}=" not in own]
        commands.append(["upcycle", "pipeline", *given, *typed.split(), "dir=run", "--yes"])
    folder = str(tmp_path_factory.mktemp("typed"))
    (found,) = run_ranks(type_commands, 1, commands, folder, str(files), process_group=False)
    return dict(zip((*MISTAKES, DRYRUN), found, strict=True))


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_answered_with_one_message_and_status_2(typed: str, answers: dict[str, Answer]) -> None:
    answer = answers[typed]
    assert answer.status == 2, answer.text
    assert MISTAKES[typed] in answer.text
    assert len(answer.text.partition("Error: ")[2].splitlines()) == 1
    assert "Traceback" not in answer.text
    assert [path for path in answer.written if "/run" in path] == []


def test_a_dry_run_forecasts_both_trainings_and_writes_nothing(answers: dict[str, Answer]) -> None:
    answer = answers[DRYRUN]
    assert answer.status == 0, answer.text
    words = " ".join(answer.text.split())
    assert "Forecast of tests.bridge.recipes:tiny in " in words
    assert f"recipe tests.bridge.recipes:tiny {DENSE_CT}" in words
    assert "checkpoints of pretrain" in words
    assert "checkpoints of dense_ct" in words
    assert "Does it pay not known: what the parent was trained on; add trained_on=15T (its tokens), or ask:" in words
    assert "pretrain.train.train_iters" not in words, "settings stand below the name of their stage"
    assert answer.written == []
