"""Refuse mistakes on a command line of `nemo upcycle` before the slow import of a trainer.

Megatron-Bridge is imported after this package. NeMo is imported before this package, so users of NeMo have to wait for
NeMo's import.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.answers import of_another_trainer
from nemo_upcycle.pipeline.context import OPTIONS, pipeline_arguments
from nemo_upcycle.pipeline.order import chosen_stages
from nemo_upcycle.pipeline.parser import command_options
from nemo_upcycle.pipeline.rewind import Rewind
from nemo_upcycle.recipes import known_recipes


def refuse_early(words: Sequence[str]) -> None:
    """Check options, stages and the recipe's name of `nemo upcycle pipeline` in an environment of Megatron-Bridge.

    Args:
        words: words of the command line after the command.

    Raises:
        UpcycleError: an option, stage or name is wrong; the check after the import would report the same mistake.
    """
    options = [*command_options(), *OPTIONS]
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in options:
            raise UpcycleError.unknown("option", name, options)
    given = dict(word.partition("=")[::2] for word in pipeline_arguments(words))
    chosen_stages(given.get("from_stage"), given.get("until_stage"), given.get("only_stage"))
    Rewind.read(given.get("rewind"), given.get("skip_steps"))
    factory = given.get("--factory") or next(
        (after for word, after in itertools.pairwise(words) if word in ("--factory", "-f")), ""
    )
    name = factory.partition("(")[0]
    if not name or "." in name or Path("workspace.py").is_file():  # the user's own recipe
        return
    known = [recipe.name for recipe in known_recipes().values() if recipe.bridge]
    if name not in known:
        raise of_another_trainer(name) or UpcycleError.unknown("factory of pipeline", name, known)
