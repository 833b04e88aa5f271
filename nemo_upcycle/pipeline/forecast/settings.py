"""The settings of a run that matter, and where each comes from: the command line, a recipe, or the executor's file."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_run.cli.cli_parser import parse_factory

from nemo_upcycle.pipeline.plan import required_training
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.trainers.values import setting


TYPED = "command line"
_OVERRIDE = re.compile(r"(?P<key>[\w.\[\]]+)\s*[-+*/|&]?=")
_INDEX = re.compile(r"\[.*")


@dataclass(frozen=True)
class Setting:
    """A setting.

    Args:
        name: as an override on the command line names it.
        value: as text.
        origin: where it comes from.
    """

    name: str
    value: str
    origin: str


class Origins:
    """Tells where settings come from.

    Args:
        words: of the command line, as they were typed.
        target: the function whose recipe `--factory` names.
    """

    def __init__(self, words: Sequence[str], target: Any) -> None:
        self.typed = {_INDEX.sub("", match["key"]) for word in words if (match := _OVERRIDE.match(word))}
        self.factory = _option(words, "--factory", "-f")
        self.recipe = self.factory.partition("(")[0].strip()
        self.executor = next((word.partition("=")[2] for word in words if word.startswith("run.executor=")), "")
        has_arguments = bool(self.recipe) and self.factory.rstrip() != self.recipe
        #: The recipe without the arguments that were typed; a value that differs from it comes from them.
        self._usual = None
        if has_arguments:
            with contextlib.suppress(Exception):  # a user's factory may need its arguments
                self._usual = parse_factory(target, "", target, self.recipe)

    def of(self, name: str, value: Any, otherwise: str) -> str:
        """Return where a setting comes from.

        Args:
            name: its override.
            value: its value.
            otherwise: where it is from if nobody typed it.
        """
        parts = name.split(".")
        if any(".".join(parts[:number]) in self.typed for number in range(1, len(parts) + 1)):
            return TYPED
        # What a trainer's own parser takes is no argument of the command, so that no factory can set it.
        if self._usual is not None and hasattr(self._usual, parts[0]) and setting(self._usual, name) != value:
            return f"{TYPED} (--factory)"
        return otherwise


def _option(words: Sequence[str], *names: str) -> str:
    """Return the value of an option, `--factory NAME` or `--factory=NAME`; empty without one."""
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in names:
            return value if equals else next(iter(words[number + 1 :]), "")
    return ""


def run_settings(plan: RunPlan, recipes: Mapping[str, str], origins: Origins) -> Iterator[Setting]:
    """Yield the settings of a run, and those of its trainings that people look at.

    Args:
        plan: what the stages are given.
        recipes: names of the recipes, by the stage of a training.
        origins: of the command.
    """
    for name in ("dense", "data", "evaluation"):
        value = getattr(plan, name)
        yield Setting(name, value, origins.of(name, value, f"recipe {origins.recipe or plan.recipe}"))
    for stage, recipe in recipes.items():
        for path, value in required_training(plan, stage).shown_settings(plan.dense).items():
            name = f"{stage}.{path}"
            yield Setting(name, str(value), origins.of(name, value, f"recipe {recipe}"))


def executor_settings(executor: Any, origins: Origins, stages: Sequence[str]) -> Iterator[Setting]:
    """Yield the plain settings of an executor that are not their defaults, and those that its stages set.

    Args:
        executor: may have `origins`, by setting where it comes from, and `stages`, by stage what differs there.
        origins: of the command.
        stages: names of those of the forecast; a setting that every one of them sets itself is shown for these alone.
    """
    if not dataclasses.is_dataclass(executor):
        return
    named: Mapping[str, str] = getattr(executor, "origins", {})
    otherwise = f"executor {origins.executor or type(executor).__name__}"
    table: Mapping[str, Mapping[str, Any]] = getattr(executor, "stages", {})
    own = {stage: table.get(stage, {}) for stage in stages}
    common = {
        field.name: value
        for field in dataclasses.fields(executor)
        if (value := getattr(executor, field.name, None)) != field.default
        and not all(field.name in settings for settings in own.values())
    }
    differing = {
        f"stages.{stage}.{name}": value for stage, settings in own.items() for name, value in settings.items()
    }
    for name, value in (common | differing).items():
        if isinstance(value, (str, int, float, bool)) and value != "":
            typed = f"run.executor.{name}"
            yield Setting(typed, str(value), TYPED if typed in origins.typed else named.get(name, otherwise))
