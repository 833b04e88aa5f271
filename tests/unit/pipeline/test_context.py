"""The command lines of `nemo upcycle`."""

from __future__ import annotations

from typing import Union

import pytest
from nemo_run.cli.cli_parser import TypeParser, type_parser

from nemo_upcycle.pipeline.context import mistake_of
from nemo_upcycle.pipeline.parser import command_options, parsing


def test_a_factory_of_an_unknown_module_is_refused() -> None:
    mistake = mistake_of("no_such_recipes.mine(nodes=2)")
    assert mistake is not None
    assert "needs the module no_such_recipes" in str(mistake)
    assert mistake_of("smollm2_135m_e8t2") is None


def test_nemo_runs_parser_is_changed_only_while_it_is_used() -> None:
    either, optional = Union[str, int], int | None  # noqa: UP007
    TypeParser.get_parser.cache_clear()  # the cache confuses `int | None` with an earlier test's `Optional[int]`
    for _ in range(2):
        assert type_parser.parse("2", either) == "2"
        with pytest.raises(Exception, match="Unsupported"):
            type_parser.parse("3", optional)
        with parsing(), parsing():
            assert type_parser.parse("2", either) == 2
            assert type_parser.parse("3", optional) == 3
            assert type_parser.parse("none", optional) is None


def test_options_are_those_of_nemo_runs_command() -> None:
    assert {"--factory", "--dryrun", "--yes", "--no-confirm", "--detach", "--to-yaml"} <= {*command_options()}
