"""The installed trainer's own parser accepts the words of every `nemo` command that the product prints."""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.errors import UpcycleError
from tests.contract.trainers import IS_BRIDGE
from tests.printed import ROOT, Printed, printed


pytestmark = [pytest.mark.slow, pytest.mark.full]
#: Recipes that readers of a page write themselves; the tests of the how-tos and examples cover them.
_OWN = re.compile(
    r"--factory \"?(my_recipes|recipe|my_llama32|stock_llama32|smollm2_135m_e16t4|\N{REPLACEMENT CHARACTER})"
)
#: Words that only Bridge accepts.
_BRIDGES = re.compile(r"\brecipe=|\btrain\.train_iters|pretrain\.upcycling\.")
#: The module that registers the recipes of `nemo upcycle pipeline`.
_PIPELINE = "nemo_upcycle.pipeline.bridge.pipeline" if IS_BRIDGE else "nemo_upcycle.pipeline.nemo.recipes"
#: Recipe that replaces NAME in help texts.
_NAME = "qwen3_600m_e8t2"


def _is_typed_here(command: Printed) -> bool:
    words = command.words
    if words[:1] != ["nemo"] or len(words) < 4 or _OWN.search(command.line) or "|" in words or words[3].endswith("="):
        return False
    is_bridges = "bridge" in command.where or bool(_BRIDGES.search(command.line))
    return is_bridges == IS_BRIDGE and "--yaml" not in words and words[1] in ("upcycle", "llm")


HERE = [command for command in printed() if _is_typed_here(command)]


def _parse(words: list[str]) -> Any:
    """Parse the words after `nemo` without starting anything."""
    from nemo_upcycle.pipeline.ablations.launch import ablate
    from nemo_upcycle.pipeline.context import CheckedContext, _check_words

    pipeline = import_module(_PIPELINE).pipeline
    if words[0] == "upcycle":
        function = ablate if words[1] == "ablate" else pipeline
        context_class = function.cli_entrypoint.run_ctx_cls
    else:
        from nemo.collections import llm

        function, context_class = getattr(llm, words[1]), CheckedContext
    context, rest = context_class(name="typed"), list(words[2:])
    if "--factory" in rest:
        at = rest.index("--factory")
        _, context.factory = rest.pop(at), rest.pop(at)
    rest = [word for word in rest if word not in ("--yes", "--dryrun", "--detach", "--verbose")]
    rest = context.arguments(rest)
    _check_words(rest, context_class.options)
    return context.parse_fn(function, context.parse_args(rest, lazy=True))


def test_the_trainers_parser_takes_every_printed_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(HERE) > (3 if IS_BRIDGE else 30)
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "conf/executors/slurm.yaml", "site.yaml")
    wrong = []
    for command in HERE:
        try:
            _parse([re.sub(r"^NAME\b", _NAME, word) for word in command.words[1:]])
        except UpcycleError as error:
            wrong.append(f"{command.where}: {command.line}: {str(error).splitlines()[0]}")
    assert wrong == []
