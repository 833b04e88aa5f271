"""What the command lines of `nemo upcycle` say."""

from __future__ import annotations

from typing import Any

import nemo_run as run
import pytest

from nemo_upcycle.pipeline.context import CheckedContext, entrypoint, mistake_of


def test_a_factory_of_a_module_that_python_does_not_find_is_told_so() -> None:
    mistake = mistake_of("no_such_recipes.mine(nodes=2)")
    assert mistake is not None
    assert mistake.got == "no module no_such_recipes"
    assert mistake_of("smollm2_135m_e8t2") is None


def test_the_list_of_commands_says_where_the_tools_are(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: dict[str, Any] = {}

    def mine() -> None:
        """Do it.

        More of it.
        """

    monkeypatch.setattr(run.cli, "entrypoint", lambda _, **options: shown.update(options))
    entrypoint(CheckedContext)(mine)
    first, second = shown["help"].split("\n\n")
    assert first.startswith("Do it. (")
    assert "nemo-upcycle --help" in first
    assert second == "More of it."
