"""Every field of ours that a recipe holds can be set on the command line, as NeMo-Run's own parser reads it."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import fiddle as fdl
import pytest


def _settings(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and configuration of everything in a recipe that this package defines."""
    if isinstance(value, fdl.Buildable):
        made = value.__fn_or_cls__
        if (
            made.__module__.startswith("nemo_upcycle.") and made.__name__ != "UpcycleStrategy"
        ):  # its arguments are NeMo's
            yield path, value
        for name, inner in value.__arguments__.items():
            yield from _settings(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _settings(item, f"{path}[{number}]")


SAMPLES: dict[Any, tuple[str, Any]] = {
    int: ("3", 3),
    float: ("0.25", 0.25),
    str: ("words", "words"),
    bool: ("true", True),
    list[str]: ("['/a','/b']", ["/a", "/b"]),
}
#: What only a factory or another setting gives.
BUILT = {"lr_scheduler", "no_weight_decay_cond", "config"}


def _overrides(path: str, made: Any) -> Iterator[tuple[str, Any]]:
    for name, parameter in inspect.signature(made).parameters.items():
        if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            continue  # a base class has them, NeMo's for one
        annotation = parameter.annotation
        kinds = typing.get_args(annotation) or (annotation,)
        optional = type(None) in kinds
        kind = next((kind for kind in (annotation, *kinds) if kind in SAMPLES), None)
        if kind:
            text, value = SAMPLES[kind]
            yield f"{path}.{name}={text}", value
        else:
            assert optional or name in BUILT, f"{path}.{name} of {made}: no value on the command line"
        if optional:
            yield f"{path}.{name}=None", None


def _value(config: Any, path: str) -> Any:
    from nemo_run.cli.cli_parser import parse_attribute

    for part in path.split("."):
        config = parse_attribute(part, config)
    return config


@pytest.mark.parametrize("name", ["smollm2_135m_e8t2", "smollm2_135m_dense_ct", "llama3_8b_e8t2"])
def test_every_field_of_this_package_can_be_overridden(name: str) -> None:
    from nemo.collections.llm.api import pretrain
    from nemo_run.cli.lazy import LazyEntrypoint

    from nemo_upcycle import recipes

    recipe = getattr(recipes, name).pretrain_recipe()
    overrides = [pair for path, config in _settings(recipe) for pair in _overrides(path, config.__fn_or_cls__)]
    assert len(overrides) > (20 if name.endswith("e8t2") else 10)
    for override, value in overrides:
        changed = LazyEntrypoint(pretrain, factory=name, overwrites=[override]).resolve()
        assert _value(changed, override.partition("=")[0]) == value, override


@pytest.mark.parametrize(("typed", "value"), [("2", 2), ("auto", "auto"), ("[0,1]", [0, 1])])
def test_a_number_is_one_where_a_text_may_stand_too(typed: str, value: Any) -> None:
    """Lightning takes `devices` as a list, a text or a number, and NeMo-Run takes the first that fits."""
    from nemo.collections.llm.api import pretrain
    from nemo_run.cli.lazy import LazyEntrypoint

    from nemo_upcycle.trainers.nemo.checks import ranks_of

    recipe = LazyEntrypoint(pretrain, factory="smollm2_135m_e8t2", overwrites=[f"trainer.devices={typed}"]).resolve()
    assert recipe.trainer.devices == value
    if typed == "2":
        assert ranks_of(recipe) == (1, 2)


def test_a_recipe_with_another_parent_and_spec_builds_its_restore_configuration(tmp_path: Any) -> None:
    from nemo.collections.llm.api import pretrain
    from nemo_run.cli.lazy import LazyEntrypoint

    from nemo_upcycle import UpcycleSpec
    from tests.functional.tiny import write_parent

    parent = write_parent(tmp_path / "parent")
    where = "resume.restore_config"
    overrides = [f"{where}.path={parent}", f"{where}.branches=['{parent}']", f"{where}.spec.top_k=4"]
    recipe = LazyEntrypoint(pretrain, factory="smollm2_135m_e8t2", overwrites=overrides).resolve()
    built = fdl.build(recipe.resume.restore_config)
    assert (built.path, built.branches) == (str(parent), [str(parent)])
    assert built.spec == UpcycleSpec(num_experts=8, top_k=4)
