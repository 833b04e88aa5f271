"""Every command printed in pages, help texts, messages and examples is accepted by its program."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from nemo_upcycle.cli.main import COMMANDS, command_parser
from nemo_upcycle.pipeline.context import OPTIONS
from nemo_upcycle.recipes import known_recipes, nemo_functions
from tests.printed import ROOT, VALUE, Printed, loose, printed


PRINTED = printed()
#: Placeholders for recipes, and recipe modules of pages and examples.
_ANY = re.compile(r"NAME|RECIPE|8|my_recipes\.\w+|recipe\.chain|smollm2_135m_e16t4|my_llama32|stock_llama32_e8t2")
_RUN_OPTIONS = {"--yes", "--dryrun", "--detach", "--verbose", "--help", "--yaml", "--grid", *OPTIONS}
_STAGES = {"pretrain", "dense_ct", "run", "arms"}


def _tool(words: list[str]) -> None:
    """Parse a command of `nemo-upcycle`; a command that is only mentioned needs no arguments."""
    if not words or words[0] == "help":
        return
    assert words[0].startswith("--") or words[0] in (*COMMANDS, VALUE), words[0]
    if words[0] == VALUE:
        return
    mentioned = [word for word in words[1:] if not word.startswith("--")] == []
    command_parser().parse_args([words[0], *["--help"] * mentioned, *words[1:]])


def _arguments(path: str, function: str) -> set[str]:
    """Return the argument names of a module's function without importing the module."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return {argument.arg for argument in found.args.args}


_TAKES = {
    "pipeline": _arguments("nemo_upcycle/pipeline/nemo/pipeline.py", "pipeline")
    | _arguments("nemo_upcycle/pipeline/bridge/pipeline.py", "pipeline"),
    "ablate": _arguments("nemo_upcycle/pipeline/ablations/launch.py", "ablate"),
}


def _nemo(words: list[str]) -> None:
    """Check a command of `nemo`: its recipe, options and arguments."""
    if len(words) < 2 or (words[0] in ("upcycle", "llm") and words[1:] == ["--help"]):
        return
    verb, rest = words[1].replace(VALUE, "pretrain"), iter(words[2:])
    assert (words[0], verb) in {("upcycle", name) for name in _TAKES} | {("llm", "pretrain"), ("llm", "finetune")}
    known = {*known_recipes(), *nemo_functions()}
    for word in rest:
        name, equals, _ = word.partition("=")
        if word == "--factory":
            factory = next(rest).partition("(")[0]
            assert factory in known or _ANY.fullmatch(factory), factory
        elif word.startswith("--"):
            assert name in _RUN_OPTIONS, word
            if name in (*OPTIONS, "--grid", "--yaml") and not equals:
                next(rest, "")
        else:
            assert equals or "|" in word, word
            owner = re.split(r"[.\[]", name)[0]
            assert words[0] == "llm" or owner in _TAKES[verb] | _STAGES, word


def _module(name: str) -> None:
    path = ROOT / name.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name


def _make(words: list[str]) -> None:
    """Check the targets of a `make` command and the environment that the command names."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {word for word in words if re.fullmatch(r"[a-z-]+", word)} <= targets
    script = (ROOT / "scripts/test_in.sh").read_text()
    environments = "|".join(re.findall(r"^    ([a-z0-9|-]+)\)", script, flags=re.MULTILINE)).split("|")
    assert {word[4:] for word in words if word.startswith("ENV=")} <= {*environments, "NAME"}


def _check(words: list[str]) -> None:
    program, *rest = words
    if program == "nemo-upcycle":
        _tool(rest)
    elif program == "nemo":
        _nemo(rest)
    elif program == "make":
        _make(rest)
    elif "-m" in rest:
        at = rest.index("-m")
        _module(rest[at + 1])
        if rest[at + 1] == "nemo_upcycle.cli":
            _tool(rest[at + 2 :])
    elif scripts := [word for word in rest if word.endswith(".py") and not word.startswith(("Megatron-Bridge", "/"))]:
        assert [name for name in scripts if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("where", sorted({one.where for one in PRINTED}))
def test_a_printed_command_is_one_that_its_program_takes(where: str, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for command in (one for one in PRINTED if one.where == where):
        try:
            _check(command.words)
        except SystemExit:
            pass  # --help
        except Exception as error:
            wrong.append(f"{command.line}: {str(error).splitlines()[0]}")
    capsys.readouterr()
    assert wrong == []


def test_commands_are_found_wherever_they_are_printed() -> None:
    found = {Path(one.where).parts[0] for one in PRINTED}
    assert {"README.md", "docs", "docker", "conf", "examples", "nemo_upcycle"} <= found
    assert len(PRINTED) > 300
    assert Printed("", "PYTHONPATH=a nemo upcycle pipeline --factory b && make c").words[-1] == "b"


def test_a_message_shows_where_its_command_ends() -> None:
    assert loose() == []
