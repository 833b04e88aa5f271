"""Configurations of NeMo's classes check names and have defaults on every Python version."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import nemo_run as run
import pytest
from nemo import lightning as nl
from nemo.lightning.io.mixin import IOMixin

from nemo_upcycle.trainers.nemo.nemo_signatures import NearestSignature
from nemo_upcycle.trainers.nemo.upcycling import UpcycleStrategy


def test_a_configuration_knows_its_names_and_defaults() -> None:
    assert run.Config(nl.Trainer).max_steps == -1
    assert run.Config(UpcycleStrategy).context_parallel_size == 1
    with pytest.raises(TypeError, match="steps_max"):
        run.Config(nl.Trainer, steps_max=3)


def test_every_nemo_class_is_shown_by_its_nearest_constructor() -> None:
    classes = set(_below(IOMixin))
    assert nl.Trainer in classes
    for made in classes:
        assert NearestSignature().__get__(None, made) == inspect.signature(made), made


def test_an_object_is_shown_by_its_call() -> None:
    class Scale(IOMixin):
        __signature__ = NearestSignature()

        def __call__(self, factor: int) -> int:
            return factor

    assert list(inspect.signature(Scale()).parameters) == ["factor"]


def _below(made: type) -> Iterator[type]:
    yield made
    for child in made.__subclasses__():
        yield from _below(child)
