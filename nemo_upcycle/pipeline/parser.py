"""Change NeMo-Run's command-line parser while a command of this package uses it. Nothing else changes NeMo-Run."""

import functools
import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Union, get_args

import nemo_run as run
import typer
from nemo_run.cli import cli_parser
from nemo_run.cli.cli_parser import TypeParser, type_parser

from nemo_upcycle.trainers.settings import of_class
from nemo_upcycle.utils.attributes import temporarily_set


_parse_in_order = TypeParser.parse_union


def _parse_numbers_first(parser: TypeParser, value: str, kinds: Any) -> Any:
    """Parse the value of a setting that allows several types; prefer a number if one of the types is a number.

    NeMo-Run tries the types in order, and accepts every word as a text. Without this function, the 2 of
    `trainer.devices=2` would stay a text.
    """
    numbers_first = sorted(get_args(kinds), key=lambda kind: kind not in (int, float))
    return _parse_in_order(parser, value, Union[tuple(numbers_first)])  # noqa: UP007


_parse_attribute = cli_parser.parse_attribute


def _parse_class(attribute: str, nested: Any) -> Any:
    """Return an attribute, or a list's element of the named class (`trainer.callbacks.MetricsLogger.gpu=h100`)."""
    if not isinstance(nested, list):
        return _parse_attribute(attribute, nested)
    if (found := of_class(nested, attribute)) is None:
        raise AttributeError(attribute)
    return found


@contextmanager
def parsing() -> Iterator[None]:
    """Let NeMo-Run parse numbers first, `int | None`, and classes in lists in the block, and silence NeMo-Run's log.

    NeMo-Run has no setting for any of these changes. A process has only one parser, which is restored after the block.
    Without the silence, NeMo-Run would log the whole configuration before it raises an error.
    """
    known = type_parser.custom_parsers  # a user's module that the block imports may add parsers
    before = dict(known)
    known[types.UnionType] = functools.partial(_parse_numbers_first, type_parser)
    TypeParser.get_parser.cache_clear()  # the class caches the function for each type
    try:
        with (
            temporarily_set(logging.getLogger("nemo_run.cli.cli_parser"), "disabled", True),
            temporarily_set(TypeParser, "parse_union", _parse_numbers_first),
            temporarily_set(cli_parser, "parse_attribute", _parse_class),
        ):
            yield
    finally:
        del known[types.UnionType]
        known.update(before)
        TypeParser.get_parser.cache_clear()


def command_options() -> list[str]:
    """List the options that every command of NeMo-Run takes, as its own command declares them.

    Example:
        >>> "--dryrun" in command_options()
        True
    """
    app = typer.Typer(add_completion=False)
    run.cli.RunContext.cli_command(app, "any", command_options)
    declared = [option for one in typer.main.get_command(app).params for option in (*one.opts, *one.secondary_opts)]
    return [option for option in declared if option.startswith("--")]
