"""Mistakes of `nemo upcycle pipeline` beside Megatron-Bridge: one line each, status 2, before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.distributed.ranks import run_ranks
from tests.functional.tiny import write_finished_inputs
from tests.functional.typed import Answer, type_commands


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
SMALL = "smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config"
TINY, DENSE_CT = "recipe=tests.bridge.recipes:tiny gpus=2", "tests.bridge.recipes:tiny_dense_ct"
#: What is typed -> what the answer names, and the value that it got.
MISTAKES = {
    f"recipe={SMALL[:-6]}cfg": f"recipe '{SMALL[:-6]}cfg' does not exist. Did you mean '{SMALL}'?",
    "recipe=tests.bridge.recipes:tini gpus=2": "recipe: got tests.bridge.recipes:tini,",
    "recipe=tests.bridge.recipes:_tiny gpus=2": "recipe: got tests.bridge.recipes:_tiny,",
    "recipe=tests.bridge.recipes:builder gpus=1": "recipe tests.bridge.recipes:builder: got UpcycledModelConfig,",
    "recipe=tests.bridge.recipes:random gpus=2": "recipe tests.bridge.recipes:random: got ",
    f"recipe={DENSE_CT} gpus=2": f"recipe: got {DENSE_CT},",
    f"{TINY} dense_ct=tests.bridge.recipes:tiny": "dense_ct: got tests.bridge.recipes:tiny,",
    "recipe=own:of_another gpus=1": "dense: got {parent},",
    f"{TINY} dense_ct=own:another": "dense: got {parent},",
    "recipe=own:of_two gpus=1": "recipe own:of_two: got 2 parents: {parent}, {another},",
    "recipe=tests.bridge.recipes:tiny": "gpus: got None,",
    "recipe=tests.bridge.recipes:tiny gpus=12": "gpus: got 12,",
    "recipe=tests.bridge.recipes:tiny gpus=16": "gpus: got 16 ",
    "recipe=tests.bridge.recipes:tiny gpus=3": "expert_model_parallel_size x pipeline_model_parallel_size: got 2,",
    f"{TINY} pretrain.train.train_itres=4": "train.train_itres=4: ",
    f"{TINY} pretrain.train.train_iters=few": "train.train_iters: got 'few',",
    f"{TINY} pretrain.model.moe_router_topk=1": "pretrain.model.moe_router_topk: got 1,",
    f"{TINY} pretrain.dataset.seq_length=32": "pretrain.model.seq_length: got 64,",
    f"{TINY} dense_ct.train.train_iters=4": "dense_ct.train.train_iters=4: got ",
    f"{TINY} pretrain.checkpoint.save=/elsewhere": "checkpoint.save: got checkpoint.save=/elsewhere,",
    f"{TINY} pretrain.++checkpoint.load=/elsewhere": "checkpoint.load: got ++checkpoint.load=/elsewhere,",
    f"{TINY} pretrain.++train.train_iters=few": "train.train_iters: got 'few',",
    f"{TINY} pretrain.model.tensor_model_parallel_size=0": "pretrain.model.tensor_model_parallel_size: got 0,",
    f"{TINY} gpus_per_node=0": "gpus_per_node: got 0,",
    f"{TINY} --detach": "--detach: got ",
    f"{TINY} --render out": "--render: got ",
    f"{TINY} recip=x": "'recip'",
    f"{TINY} dense=/nope": "model '/nope': got ",
    f"{TINY} data=/nope": "blend '/nope'",
    # a parent that is fetched before it can be opened
    "--factory smollm2_135m_e8t2 pretrain.train.train_itres=4": "train.train_itres=4: ",
    f"dense=asset://smollm2-135m recipe={SMALL.replace('e8t2', 'dense_ct')}": "recipe: got smollm2_135m_dense_ct_",
    f"{TINY} evaluation=dmo": "'dmo' does not exist. Did you mean 'demo'?",
    f"{TINY} trained_on=lots": "trained_on: got 'lots',",
    f"{TINY} --from evaluate": "",
}
#: Recipes of a user's own, with their parents written in.
OWN = """
from pathlib import Path
from nemo_upcycle import UpcycleSpec
from tests.bridge.recipes import in_own_words

PARENT, ANOTHER, SPEC = Path("{parent}"), Path("{another}"), UpcycleSpec(num_experts=4, top_k=2)

def of_another(): return in_own_words(ANOTHER, SPEC)
def of_two(): return in_own_words(PARENT, SPEC, ANOTHER)
def another(): return in_own_words(ANOTHER, None)
def linked(): return in_own_words(Path("{link}"), SPEC)
"""
DRYRUN = f"{TINY} dense_ct={DENSE_CT} --dryrun"
#: The parent of such a recipe, by another name.
LINKED = "recipe=own:linked gpus=1 --dryrun"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a parent, its tokenised texts and a suite, another parent of its shape, and a link to it."""
    folder = write_finished_inputs(tmp_path_factory.mktemp("inputs"))
    another = shutil.copytree(folder / "parent", folder / "another") / "model.safetensors"
    save_file({name: 2 * weights for name, weights in load_file(another).items()}, another, {"format": "pt"})
    (folder / "link").symlink_to(folder / "parent")
    return folder


@pytest.fixture(scope="module")
def answers(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """What the command answers to every mistake; the process imports Bridge once."""
    named = {"dense": files / "parent", "data": files / "blend", "evaluation": files / "evaluation.yaml"}
    commands, dry_runs = [], (DRYRUN, LINKED)
    for typed in (*MISTAKES, *dry_runs):
        own = ["dense="] if "--factory" in typed else []
        given = [f"{name}={path}" for name, path in named.items() if f"{name}=" not in typed and f"{name}=" not in own]
        commands.append(["upcycle", "pipeline", *given, *typed.split(), "dir=run", "--yes"])
    folder = tmp_path_factory.mktemp("typed")
    (folder / "own.py").write_text(OWN.format(**_parents(files)))
    (found,) = run_ranks(type_commands, 1, commands, str(folder), str(files), process_group=False)
    return dict(zip((*MISTAKES, *dry_runs), found, strict=True))


def _parents(files: Path) -> dict[str, Path]:
    return {name: files / name for name in ("parent", "another", "link")}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_answered_with_one_message_and_status_2(
    typed: str, answers: dict[str, Answer], files: Path
) -> None:
    answer = answers[typed]
    assert answer.status == 2, answer.text
    (said,) = answer.text.partition("Error: ")[2].splitlines()
    assert MISTAKES[typed].format(**_parents(files)) in said
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
    for stage in ("pretrain", "dense_ct"):
        assert f"{stage}: the learning rate goes up to 0.001" in words
    assert "pretrain.train.train_iters" in words
    assert answer.written == []


def test_a_parent_that_is_written_in_may_be_named_by_a_link(answers: dict[str, Answer]) -> None:
    assert answers[LINKED].status == 0, answers[LINKED].text
