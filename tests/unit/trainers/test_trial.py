"""The search for the setting at which a construction fails."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.trial import wrong_choices, wrong_settings


SETTINGS: dict[str, Any] = {f"part.field_{number}": number for number in range(9)} | {"part.kind": "banana"}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"part.field_3": "field_3 is too small"}, ["part.field_3"]),
        ({"part.kind": "no such thing: banana", "part.field_1": "not field_1"}, ["part.kind", "part.field_1"]),
        ({"part.field_7": "division by zero"}, ["part.field_7"]),
    ],
)
def test_every_setting_that_fails_is_named_by_what_goes_away_without_it(
    wrong: dict[str, str], named: list[str]
) -> None:
    def construct(left_out: Collection[str]) -> None:
        for name, text in wrong.items():
            if name not in left_out:
                raise ValueError(text)

    found = list(wrong_settings(construct, SETTINGS, "box"))
    assert [error.field for error in found] == named
    assert [text in str(error) for error, text in zip(found, wrong.values(), strict=True)] == [True] * len(found)


@pytest.mark.parametrize("error", [ValueError("no setting of it"), ImportError("no module field_3")])
def test_what_may_be_the_trials_own_failure_is_said_and_refuses_nothing(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def construct(left_out: Collection[str]) -> None:
        if "part.field_3" not in left_out or isinstance(error, ValueError):
            raise error

    assert list(wrong_settings(construct, SETTINGS, "box")) == []
    assert capsys.readouterr().err == f"Not tried before the start, box: {error}\n"


def test_the_words_of_an_own_error_stay() -> None:
    def construct(left_out: Collection[str]) -> None:
        if "part.kind" not in left_out:
            raise SpecError(field="kind", got="banana", expected="a fruit of another form", fix="peel it")

    (error,) = wrong_settings(construct, SETTINGS, "box")
    assert str(error) == "part.kind: got banana, expected a fruit of another form. Fix: peel it."


def test_a_name_that_an_annotation_does_not_list_is_unknown() -> None:
    @dataclass
    class Config:
        kind: Literal["apple", "pear"] | None = None
        size: int = 1

    assert list(wrong_choices(Config("pear"), "part.")) == list(wrong_choices(Config(), "part.")) == []
    (error,) = wrong_choices(Config("appel"), "part.")  # type: ignore[arg-type]
    assert str(error) == "part.kind 'appel' does not exist. Did you mean 'apple'? Valid: apple, pear."
