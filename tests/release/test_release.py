"""Test a release as users install it: an environment with the wheel and its dependencies, without a clone."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from nemo_upcycle import __version__
from tests.functional import tiny


ROOT = Path(__file__).parents[2]
#: Programs of the environment that `make release` makes.
BIN = ROOT / "build/release/.venv/bin"


def run(folder: Path, *words: object, statuses: tuple[int, ...] = (0,)) -> str:
    done = subprocess.run([BIN / str(words[0]), *map(str, words[1:])], cwd=folder, capture_output=True, text=True)
    assert done.returncode in statuses, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small parent and texts, and nothing else."""
    made = tmp_path_factory.mktemp("user")
    tiny.write_parent(made / "parent")
    tiny.write_texts(made / "texts")
    return made


def test_doctor_finds_the_release_and_makes_the_data_environment(folder: Path) -> None:
    found = json.loads(run(folder, "nemo-upcycle", "doctor", "--json", statuses=(0, 1)))
    assert found["nemo_upcycle"] == __version__
    where = run(folder, "python", "-c", "import nemo_upcycle; print(nemo_upcycle.__file__)")
    assert Path(where).is_relative_to(BIN.parent)
    for fix in found["fixes"]:
        subprocess.run(fix, shell=True, cwd=folder, check=True, executable="/bin/bash")
    assert json.loads(run(folder, "nemo-upcycle", "doctor", "--json"))["fits"]


def test_texts_become_tokens_in_that_environment(folder: Path) -> None:
    run(folder, "nemo-upcycle", "data", "texts/train", "blend", "tokenizer=parent")
    assert (folder / "blend/manifest.json").is_file()


def test_a_parent_is_converted_and_equals_what_it_was(folder: Path) -> None:
    run(folder, "nemo-upcycle", "convert", "parent", "moe", "--experts", 4)
    run(folder, "nemo-upcycle", "verify", "parent", "moe")


def test_recipes_are_forecast_and_written(folder: Path) -> None:
    said = run(folder, "nemo", "llm", "pretrain", "--factory", "llama3_8b_e8t2", "--dryrun", statuses=(0, 1))
    assert "expert_model_parallel_size=8" in said
    run(folder, "nemo-upcycle", "start", "parent", "texts/train", "--dir", "run")
    assert (folder / "run/recipe.py").is_file()
