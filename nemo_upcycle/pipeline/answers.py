"""Answer mistakes on the command line of `nemo upcycle`. This module imports nothing slow."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.recipes import known_recipes
from nemo_upcycle.utils.console import end_soon
from nemo_upcycle.utils.masking import without_secrets


def refuse_bridge(words: Sequence[str]) -> None:
    """Check that the words of `nemo upcycle pipeline` are for NeMo, the trainer of this environment.

    Args:
        words: words of the command line after the command.

    Raises:
        UpcycleError: the words name a recipe of Megatron-Bridge.

    Example:
        >>> refuse_bridge(["--factory", "llama3_8b_e8t2"])
    """
    if given := next((word for word in words if word.startswith("recipe=")), None):
        raise UpcycleError(
            f"Argument '{given}'",
            kind="refused",
            got="is for Megatron-Bridge, and this environment has NeMo",
            fix=(
                "name a recipe of NeMo with --factory; or, for Bridge, run the command in an environment made by `pip "
                'install -e ".[bridge,eval,demo]"`'
            ),
        )


def of_another_trainer(name: str) -> UpcycleError | None:
    """Return the error for an upcycling recipe that only another trainer has; None if no trainer has the recipe.

    Args:
        name: name of the recipe, as `--factory` takes it.

    Example:
        >>> of_another_trainer("nothing") is None
        True
    """
    known = known_recipes().get(name)
    if known is None or known.spec is None:
        return None
    is_bridges = bool(known.bridge)
    other, here = ("Megatron-Bridge", "NeMo") if is_bridges else ("NeMo", "Megatron-Bridge")
    return UpcycleError(
        f"Recipe {name}",
        kind="refused",
        got=f"is only for {other}, and this environment has {here}",
        fix=f"type `nemo upcycle pipeline --factory {name} --dryrun` in an environment that has {other}",
    )


@contextmanager
def answered() -> Iterator[None]:
    """Answer a user's mistake with one message, and exit with its status."""
    try:
        yield
    except UpcycleError as error:
        plain = getattr(error, "proxy_base_exception", error)  # fiddle appends the configuration that it was building
        sys.stderr.write(f"Error: {without_secrets(str(plain))}\n")
        end_soon()
        raise SystemExit(error.exit_status) from None  # NeMo-Run turns every Exception into status 1
