"""Mistakes on the command line are answered with one message and status 2, and nothing is written."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers

from tests.contract.mistakes import DENSE_CT, GIVEN, OF_BRIDGE, OF_NEMO, TINY
from tests.contract.trainers import IS_BRIDGE
from tests.distributed.ranks import run_ranks
from tests.functional.tiny import write_finished_inputs, write_parent
from tests.functional.typed import Answer, type_commands


pytestmark = pytest.mark.slow
MISTAKES = OF_BRIDGE if IS_BRIDGE else OF_NEMO
#: Correct commands for Bridge: a dry run, and a dry run of a recipe that names the parent by a symbolic link.
DRYRUN = f"{TINY} dense_ct=tests.bridge.recipes:tiny --dryrun --verbose"
LINKED = f"{GIVEN} recipe=own:linked dense_ct={DENSE_CT} gpus=2 --dryrun"
#: A user's own recipes for Bridge, with their parents set inside.
OWN = """
from pathlib import Path
from nemo_upcycle import UpcycleSpec
from tests.bridge.recipes import in_own_words

PARENT, ANOTHER, SPEC = Path("FILES/parent"), Path("FILES/another"), UpcycleSpec(num_experts=4, top_k=2)

def of_two(): return in_own_words(PARENT, SPEC, ANOTHER)
def linked(): return in_own_words(Path("FILES/link"), SPEC)
"""
GRID = """
dense: FILES/parent
data: FILES/blend
evaluate: {suite: FILES/evaluation.yaml, every_n_steps: 2}
seeds: [1]
arms: {moe: {ARM}}
"""
if IS_BRIDGE:
    PREFIX, ARM = "model", 'recipe: "tests.bridge.recipes:tiny", gpus: 2'
else:
    PREFIX, ARM = "model.config", "factory: tests.contract.nemo_recipes.moe"
#: A mistake that shows only when the model is constructed.
UNTRIED = f"{ARM}, set: {{{PREFIX}.moe_router_group_topk: 2}}"
WRONG = f"{ARM}, spec: {{router_int: zero}}" if IS_BRIDGE else "factory: llama_1m_e8t3"
#: Name of a file -> its text. Most files have a mistake.
FILES = {
    "wrong_recipe.py": "def mine():\n    return llm.llama3_8b.pretrain_recipe()\n",
    "wrong_import.py": "import no_such_module\n",
    "own.py": OWN,
    "not.yaml": "files: [\n",
    "key.yaml": "data: text\nflies: 1\n",
    "a.txt": "the state of our union",
    "grid.yaml": GRID.replace("ARM", WRONG),
    "untried.yaml": GRID.replace("ARM", UNTRIED),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent, its tokenised texts, a suite, another parent of the same shape, a link, and mistakes."""
    folder = write_finished_inputs(tmp_path_factory.mktemp("files"))
    another = shutil.copytree(folder / "parent", folder / "another") / "model.safetensors"
    save_file({name: 2 * weights for name, weights in load_file(another).items()}, another, {"format": "pt"})
    tokenizer = Tokenizer.from_file(str(write_parent(folder / "other") / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save(str(folder / "other/tokenizer.json"))
    (folder / "link").symlink_to(folder / "parent")
    for name, text in FILES.items():
        (folder / name).write_text(text.replace("FILES", str(folder)))
    return folder


@pytest.fixture(scope="module")
def answers(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """The answer to every command, from one process that has already imported the trainer."""
    typed = [*MISTAKES, *([DRYRUN, LINKED] if IS_BRIDGE else [])]
    commands = [[*line.replace("FILES", str(files)).split(), "--yes"] for line in typed]
    folder = str(tmp_path_factory.mktemp("typed"))
    (found,) = run_ranks(type_commands, 1, commands, folder, str(files), process_group=False)
    return dict(zip(typed, found, strict=True))


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_answered_with_one_message_and_status_2(
    typed: str, answers: dict[str, Answer], files: Path
) -> None:
    answer = answers[typed]
    assert answer.status == 2, answer.text
    said = answer.text.partition("Error: ")[2]
    assert MISTAKES[typed].replace("FILES", str(files)) in said
    assert "Traceback" not in answer.text
    if "--dryrun" not in typed and not IS_BRIDGE:
        several = re.match(r"(\d+) mistakes:", said)  # one line for each mistake
        assert len(answer.text.splitlines()) <= 4 + int(several[1] if several else 0), answer.text
    assert [path for path in answer.written if "/run" in path or not IS_BRIDGE] == []


@pytest.mark.skipif(not IS_BRIDGE, reason="tests/functional/test_dryrun.py has NeMo's")
def test_a_dry_run_forecasts_both_trainings_and_writes_nothing(answers: dict[str, Answer]) -> None:
    answer = answers[DRYRUN]
    assert answer.status == 0, answer.text
    words = " ".join(answer.text.split())
    assert "Forecast of tests.bridge.recipes:tiny in " in words
    assert "checkpoints of pretrain" in words
    assert "checkpoints of dense_ct" in words
    for stage in ("pretrain", "dense_ct"):
        assert f"{stage}: the learning rate rises to 0.001" in words
    assert "pretrain.train.train_iters" in words
    assert answer.written == []
    assert answers[LINKED].status == 0, answers[LINKED].text
