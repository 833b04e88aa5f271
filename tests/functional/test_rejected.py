"""`--dryrun`, `--render` and `--yes` refuse settings that a job would reject, all with the same words."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.functional.rejected import OLD, REJECTED, SITES


pytestmark = [pytest.mark.slow, pytest.mark.full]
#: Option -> exit statuses of a command that is refused with this option.
STATUSES = {"--dryrun": (1, 2), "--render": (2,), "--yes": (2,)}
#: Recipe of a model that a CPU can train, and of a larger model.
SMALL = "--factory smollm2_135m_e8t2"
LARGE = "--factory llama3_8b_e8t2 dense=hf://meta-llama/Meta-Llama-3-8B data=sotu evaluation=demo"


def _answers(typed: list[list[str]], folder: str) -> list[tuple[int, str]]:
    """Type commands after `nemo upcycle pipeline`; the confirmation is denied, so nothing starts."""
    from nemo_run.cli.api import _load_entrypoints

    from nemo_upcycle.pipeline.context import PipelineContext
    from nemo_upcycle.pipeline.nemo.pipeline import pipeline

    class Context(PipelineContext):
        def confirm(self) -> bool:
            return False

    _load_entrypoints()  # registers the recipes
    os.chdir(folder)
    answers = []
    for words in typed:
        words = list(words)
        chosen = {name: words.pop(words.index(option) + 1) for name, option in _VALUES if option in words}
        flags = {name: option in words for name, option in _FLAGS}
        context = Context(name="pipeline", **chosen, **flags)
        rest = [word for word in words if word not in {option for _, option in (*_VALUES, *_FLAGS)}]
        said, status = io.StringIO(), 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                context.cli_execute(pipeline, rest, "experiment")
            except SystemExit as exit_:
                status = int(exit_.code or 0)
        answers.append((status, said.getvalue()))
    return answers


_VALUES = (("factory", "--factory"), ("yaml", "--yaml"))
_FLAGS = (("dryrun", "--dryrun"), ("skip_confirmation", "--yes"), ("detach", "--detach"))


def _words(site: str, typed: str, how: str, files: Path) -> list[str]:
    """Return a command line: a row's words, and the usual recipe, folder and site unless the row sets them."""
    given = shlex.split(typed.removeprefix("LARGE "))
    baseline = "" if "dense_ct" in typed else "dense_ct=None"  # saves half the work
    usual = shlex.split(f"{LARGE if 'LARGE' in typed else SMALL} {baseline} dir=FILES/run {SITES[site]}")
    names = {word.partition("=")[0] for word in given}
    words = [word for word in usual if word.partition("=")[0] not in names]
    words += [*given, how, *(["out"] if how == "--render" else [])]
    return [word.replace("FILES", str(files)) for word in words]


def _plain(text: str) -> str:
    """Undo the line breaks of a forecast."""
    return " ".join(text.replace("\\\n", "\n").split())


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files of a user."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "a.txt").touch()
    (folder / "old.yaml").write_text(OLD)
    return folder


@pytest.fixture(scope="module")
def answers(files: Path) -> dict[tuple[str, str], dict[str, tuple[int, str]]]:
    """The answers to each row, by option; all come from one process."""
    rows = [(site, typed) for site, typed, _ in REJECTED]
    keys = [(*row, how) for row in rows for how in STATUSES if how != "--render" or row[0] != "here"]
    commands = [_words(*key, files) for key in keys]
    (found,) = run_ranks(_answers, 1, commands, str(files), process_group=False)
    answers: dict[tuple[str, str], dict[str, tuple[int, str]]] = {row: {} for row in rows}
    for (site, typed, how), answer in zip(keys, found, strict=True):
        answers[site, typed][how] = answer
    return answers


def test_what_is_refused_writes_nothing(
    answers: dict[tuple[str, str], dict[str, tuple[int, str]]], files: Path
) -> None:
    assert answers
    assert sorted(path.name for path in files.iterdir()) == ["a.txt", "old.yaml"]


@pytest.mark.parametrize(("site", "typed", "words"), REJECTED)
def test_a_dry_run_a_rendering_and_a_start_refuse_alike(
    site: str, typed: str, words: str, answers: dict[tuple[str, str], dict[str, tuple[int, str]]]
) -> None:
    found = answers[site, typed]
    for how, (status, text) in found.items():
        assert status in STATUSES[how], f"{how} ends with {status}\n{text}"
        assert words in _plain(text), f"{how} says\n{text}"
    _, _, refused = found["--yes"][1].rpartition("Error: ")
    messages = [line.strip() for line in refused.splitlines() if not re.fullmatch(r"\d+ mistakes:", line)]
    for how, (_, text) in found.items():
        missing = [line for line in messages if _plain(line) not in _plain(text)]
        assert missing == [], f"{how} says\n{text}"
