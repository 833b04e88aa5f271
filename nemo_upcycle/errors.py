"""The package's errors.

Every message names the thing, the value got, the value expected and the fix. Commands turn an `UpcycleError` into one
paragraph on stderr and exit status 2; nothing else is shown to the user.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from typing_extensions import Self


class UpcycleError(Exception):
    """A mistake of the user's or of the input's: shown as it is, without a traceback.

    Args:
        what: the thing that is wrong; without the other arguments, the whole message.
        got: its value.
        expected: the values that are right.
        fix: what to do.

    Example:
        >>> str(SpecError("top_k", got=9, expected="1 to num_experts (8)", fix="lower top_k"))
        'top_k: got 9, expected 1 to num_experts (8). Fix: lower top_k.'
    """

    #: Of a command that ends so: bad usage or bad input.
    exit_status = 2

    def __init__(self, what: str, *, got: object = None, expected: object = None, fix: str = "") -> None:
        super().__init__(f"{what}: got {got}, expected {expected}. Fix: {fix.rstrip('.')}." if fix else what)

    @classmethod
    def unknown(cls, what: str, name: str, valid: Iterable[str]) -> Self:
        """Return the error for a name that does not exist, with the closest one that does.

        Example:
            >>> str(SpecError.unknown("method", "copi", ["copy", "noise"]))
            "method 'copi' does not exist. Did you mean 'copy'? Valid: copy, noise."
        """
        names = sorted(valid)
        return cls(f"{what} '{name}' does not exist.{did_you_mean(name, names)} Valid: {', '.join(names)}.")


def did_you_mean(name: str, valid: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """Return a sentence that proposes the closest valid name, or an empty text if none is close.

    Args:
        name: the name that does not exist.
        valid: the names that exist.
        prefix: put in front of the proposed name.
        cutoff: how alike the two must be, 0 to 1, as `difflib` measures it.

    Example:
        >>> did_you_mean("trainr", ["trainer", "data"], prefix="pretrain.")
        " Did you mean 'pretrain.trainer'?"
    """
    spelled = {one.lower(): one for one in valid}
    begun = [one for one in spelled if len(name) > 3 and one.startswith(name.lower())]
    near = begun if len(begun) == 1 else difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=cutoff)
    close = [spelled[one] for one in near]
    return f" Did you mean '{prefix}{close[0]}'?" if close else ""


class SpecError(UpcycleError):
    """An `UpcycleSpec`, or its agreement with the model or the layout, is wrong."""


class CheckpointError(UpcycleError):
    """A checkpoint is missing, truncated, of another architecture, or does not fit the model."""


class StageError(UpcycleError):
    """A stage of the pipeline cannot start or did not finish."""


class UnfinishedError(StageError):
    """A stage that was started did not finish: no mistake of the command's."""

    exit_status = 1


class TrainingError(UpcycleError):
    """A training broke down: going on from its state would spoil the run."""


class StageStopped(Exception):
    """A stage ended before its work was done, by request: the same command goes on from what it kept."""

    #: Of a process that ended so: EX_TEMPFAIL of sysexits.h.
    exit_status = 75

    @classmethod
    def with_steps(cls, stage: str, kept: int, wanted: int) -> StageStopped:
        """Return the message of a training that kept some of its steps."""
        kept_text = f"{kept} of {wanted} steps are kept"
        return cls(f"stage '{stage}' stopped early: {kept_text}, and the same command goes on from there")
