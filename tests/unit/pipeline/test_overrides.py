"""Every setting that this package adds to a recipe can be set on the command line, through NeMo-Run's parser."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import fiddle as fdl
import pytest
from nemo.collections.llm.api import pretrain
from nemo_run.cli.cli_parser import parse_attribute
from nemo_run.cli.lazy import LazyEntrypoint

from nemo_upcycle import recipes
from nemo_upcycle.pipeline.context import _first_bad_override
from nemo_upcycle.pipeline.nemo import recipes as registered
from nemo_upcycle.pipeline.parser import parsing
from nemo_upcycle.trainers.settings import setting


SAMPLES: dict[Any, tuple[str, Any]] = {
    int: ("3", 3),
    float: ("0.25", 0.25),
    str: ("words", "words"),
    bool: ("true", True),
    list[str]: ("['/a','/b']", ["/a", "/b"]),
}
#: Fields that only a factory or another setting can fill.
BUILT = {"lr_scheduler", "no_weight_decay_cond", "config"}


def _typed(*overrides: str) -> Any:
    assert registered  # importing the recipes registers them with NeMo-Run
    with parsing():
        return LazyEntrypoint(pretrain, factory="smollm2_135m_e8t2", overwrites=list(overrides)).resolve()


def _ours(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and configuration of every object in a recipe whose class this package defines."""
    if isinstance(value, fdl.Buildable):
        made = value.__fn_or_cls__
        # UpcycleStrategy has the arguments of NeMo's strategy.
        if made.__module__.startswith("nemo_upcycle.") and made.__name__ != "UpcycleStrategy":
            yield path, value
        for name, inner in value.__arguments__.items():
            yield from _ours(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _ours(item, f"{path}[{number}]")


def test_every_field_of_this_package_can_be_overridden() -> None:
    values, nones = dict[str, tuple[str, Any]](), list[str]()
    for path, config in _ours(recipes.smollm2_135m_e8t2.pretrain_recipe()):
        for name, parameter in inspect.signature(config.__fn_or_cls__).parameters.items():
            if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                continue  # the function passes these arguments to a base class, such as a class of NeMo
            kinds = (parameter.annotation, *typing.get_args(parameter.annotation))
            kind = next((kind for kind in kinds if kind in SAMPLES), None)
            if kind:
                values[f"{path}.{name}"] = SAMPLES[kind]
            else:
                assert type(None) in kinds or name in BUILT, f"{path}.{name}: no value on the command line"
            if type(None) in kinds and not isinstance(config.__arguments__.get(name), fdl.Buildable):
                nones.append(f"{path}.{name}")
    assert len(values) > 15
    changed = _typed(*(f"{path}={text}" for path, (text, _) in values.items()))
    assert {path: _value(changed, path) for path in values} == {path: value for path, (_, value) in values.items()}
    changed = _typed(*(f"{path}=None" for path in nones))
    assert [path for path in nones if _value(changed, path) is not None] == []


def _value(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = parse_attribute(part, config)
    return config


@pytest.mark.parametrize(("typed", "value"), [("2", 2), ("auto", "auto"), ("[0,1]", [0, 1])])
def test_a_number_is_one_where_a_text_may_stand_too(typed: str, value: Any) -> None:
    """Lightning accepts a list, a text or a number for `devices`, and NeMo-Run chooses the first matching type."""
    assert _typed(f"trainer.devices={typed}").trainer.devices == value


def test_a_callback_is_addressed_by_its_class() -> None:
    typed = _typed("trainer.callbacks.MetricsLogger.expert_distance_every=7")
    assert setting(typed, "trainer.callbacks.MetricsLogger.expert_distance_every") == 7


def test_a_class_that_no_callback_has_is_refused_by_name() -> None:
    key, recipe = "trainer.callbacks.MetricsLoger.gpu", _typed()
    error = _first_bad_override(recipe, [(key, "=", "h100")])
    assert str(error) == (
        f"setting '{key}' does not exist: 'MetricsLoger' is none of these callbacks."
        " Did you mean 'trainer.callbacks.MetricsLogger'? Valid: LossGuard, MetricsLogger, StopOnSignal."
    )
