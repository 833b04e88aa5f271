"""The search for the setting at which a construction fails; `tests/contract/test_contract.py` has what it finds."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from nemo_upcycle.errors import SpecError
from nemo_upcycle.trainers.trial import wrong_settings


SETTINGS: dict[str, Any] = {f"part.field_{number}": number for number in range(9)} | {"part.kind": "banana"}


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
