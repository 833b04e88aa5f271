"""Errors while a training is constructed; `tests/contract/test_contract.py` constructs real trainings."""

from __future__ import annotations

import pytest

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.trainers.trial import construction_errors


def test_an_error_of_this_machine_is_printed_and_refuses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def construct() -> list[UpcycleError]:
        raise ImportError("no module banana")

    assert construction_errors(construct, "box") == []
    assert capsys.readouterr().err == "Not constructed before the start: box: ImportError: no module banana\n"


def test_own_errors_keep_their_words() -> None:
    own = SpecError(field="kind", got="banana", expected="a fruit of another form", fix="peel it")

    def construct() -> list[UpcycleError]:
        raise own

    assert construction_errors(construct, "box") == [own]
