"""The package's errors, stored as data: kind of mistake, subject, value, expected value and fix.

`str(error)` turns the data into sentences by kind. Commands print them on stderr and end with status 2.
"""

from __future__ import annotations

import copy
import difflib
import re
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast


if TYPE_CHECKING:
    from typing_extensions import Self

Kind = Literal["value", "missing", "not found", "state", "changed", "refused"]

#: How each kind of mistake is put into words. `got` is a value, a name or a list of files. In the last three forms,
#: `got` is the rest of the sentence, such as "has no receipt".
_FORMS: dict[Kind, str] = {
    "value": "{subject} is {got}; expected {expected}",
    "not found": "No {subject} {got}",
    "changed": "{subject} changed after {expected}: {got}",
    "missing": "{subject} {got}",
    "state": "{subject} {got}",
    "refused": "{subject} {got}",
}

#: Pattern of another field's name in the text of an error, such as `<top_k>`.
_FIELD = re.compile(r"<([^<>]+)>")


class UpcycleError(Exception):
    """A mistake of the user or in the input, shown without a traceback.

    | kind | example |
    |---|---|
    | value | `top_k is 9; expected 1 to 8 (num_experts). Lower top_k.` |
    | missing | `NeMo-Run is not installed. Run: pip install nemo-run.` |
    | not found | `No folder /nope. Did you mean /nose?` |
    | state | `runs/x has no receipt. Name another folder.` |
    | changed | `1 input file changed after data/kd was built: a.jsonl. Rebuild it, or restore the file.` |
    | refused | `--only cannot be combined with --from. Omit one of them.` |

    Args:
        subject: the thing that is wrong; if no other argument is given, the whole message.
        kind: the kind of mistake, which decides the form of the sentence.
        got: wrong value. If the kind is `missing`, `state` or `refused`, `got` is the rest of the sentence, such as
            "has no receipt".
        expected: the valid values. If the kind is `missing`, `state` or `refused`, `expected` is the reason, if any.
            If the kind is `changed`, `expected` is the event before the change. A tuple, given without a fix, lists
            all names that exist.
        fix: what to do, as an imperative, such as "set <top_k>=2".
        field: name of the wrong setting in the code that raises the error, given instead of a subject. `got`,
            `expected` and `fix` then name other settings as `<name>`, so that `renamed` finds them.

    Example:
        >>> error = SpecError(field="top_k", got=9, expected="1 to <num_experts> (8)", fix="set <top_k>=8")
        >>> str(error)
        'top_k is 9; expected 1 to num_experts (8). Set top_k=8.'
        >>> str(error.renamed(lambda name: f"spec.{name}"))
        'spec.top_k is 9; expected 1 to spec.num_experts (8). Set spec.top_k=8.'
        >>> str(UpcycleError("runs/x", kind="state", got="has no receipt", fix="name another folder"))
        'runs/x has no receipt. Name another folder.'
    """

    #: Exit status of a command that ends with this error: bad usage or bad input.
    exit_status = 2

    def __init__(
        self,
        subject: str = "",
        *,
        kind: Kind = "value",
        got: object = None,
        expected: object = None,
        fix: str = "",
        field: str = "",
    ) -> None:
        self.subject, self.kind, self.got, self.expected = subject or field, kind, got, expected
        self.fix, self.field = fix, field
        self._parts: tuple[UpcycleError, ...] = ()
        super().__init__(self.subject)

    @classmethod
    def unknown(cls, field: str, name: str, valid: Iterable[str]) -> Self:
        """Return the error for a name that does not exist, with the closest valid name.

        Example:
            >>> str(SpecError.unknown("method", "copi", ["copy", "noise"]))
            "method 'copi' does not exist. Did you mean 'copy'? Valid: copy, noise."
        """
        return cls(kind="not found", field=field, got=name, expected=tuple(sorted(valid)))

    @classmethod
    def no_path(cls, what: str, path: str | Path, fix: str = "check the path") -> Self:
        """Return the error for a file or folder that does not exist, with the closest name in the same folder.

        Args:
            what: the kind of path, such as "folder" or "file of texts".
            path: the path that does not exist.
            fix: what to do if the folder has no similar name.

        Example:
            >>> str(UpcycleError.no_path("folder", "/nope/run"))
            'No folder /nope/run. Check the path.'
        """
        folder = Path(path).parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(Path(path).name, names, n=1)
        return cls(what, kind="not found", got=path, fix=f"did you mean {folder / near[0]}?" if near else fix)

    def __str__(self) -> str:
        return f"{self.problem}. {_sentence(self._plain(self.fix))}" if self.fix else self.problem

    @property
    def problem(self) -> str:
        """The message without the fix."""
        if self.kind == "not found" and isinstance(self.expected, tuple):
            hint = did_you_mean(str(self.got), self.expected)
            return f"{self._title} '{self.got}' does not exist.{hint} Valid: {', '.join(self.expected)}."
        if not self.fix:
            return self.subject
        got = self.got if self.kind == "value" else self._plain(self.got)
        expected = self._plain(self.expected)
        text = _FORMS[self.kind].format(subject=self._title, got=got, expected=expected)
        is_reason = self.expected is not None and "{expected}" not in _FORMS[self.kind]
        return f"{text}: {expected}" if is_reason else text

    @property
    def _title(self) -> str:
        """The subject, with a capital letter if it has several words and is not the name of a setting."""
        first, _, rest = self.subject.partition(" ")
        is_phrase = bool(rest) and first.isalpha() and not self.field and self.kind != "not found"
        return self.subject[:1].upper() + self.subject[1:] if is_phrase else self.subject

    def _plain(self, text: object) -> str:
        return _FIELD.sub(r"\1", str(text)) if self.field else str(text)

    def renamed(self, name: Callable[[str], str]) -> Self:
        """Return this error with the names of fields that the user knows, or unchanged if the error has no field."""
        if self._parts:
            return self.together([part.renamed(name) for part in self.parts])
        if not self.field:
            return self
        error = copy.copy(self)
        error.field = name(self.field)
        if self.subject == self.field:
            error.subject = error.field
        error.fix = _renamed(self.fix, name)
        if isinstance(self.expected, str):
            error.expected = _renamed(self.expected, name)
        if isinstance(self.got, str) and self.kind != "value":  # keep a wrong value, which is the user's text
            error.got = _renamed(self.got, name)
        return error

    @classmethod
    def together(cls, errors: Iterable[UpcycleError]) -> Self:
        """Return one error that lists several errors, each text once; return a single error unchanged.

        Example:
            >>> str(UpcycleError.together([UpcycleError("no recipe"), UpcycleError("no data")]))
            '2 mistakes:\\n  no recipe\\n  no data'
        """
        parts = {str(part): part for error in errors for part in error.parts}
        if len(parts) == 1:
            return cast("Self", next(iter(parts.values())))
        error = cls("\n  ".join([f"{len(parts)} mistakes:", *parts]))
        error._parts = tuple(parts.values())
        return error

    @property
    def parts(self) -> tuple[UpcycleError, ...]:
        """The errors that this error lists; only the error itself if it lists no errors."""
        return self._parts or (self,)

    def within(self, where: str) -> Self:
        """Return this error with a place in front of its subject."""
        if self._parts:
            return self.together([part.within(where) for part in self.parts])
        error = copy.copy(self)
        error.subject = f"{where}: {self.subject}"
        return error


def _renamed(text: str, name: Callable[[str], str]) -> str:
    """Return a text in which each field has the name that the user knows."""
    return _FIELD.sub(lambda found: f"<{name(found[1])}>", text)


def _sentence(text: str) -> str:
    """Return a text with a capital letter and a full stop."""
    end = "" if text.endswith((".", "?")) else "."
    return f"{text[:1].upper()}{text[1:]}{end}"


def failures(checks: Iterable[Callable[[], object]]) -> list[UpcycleError]:
    """Call every check, and return the errors that they raise.

    Args:
        checks: functions that raise an UpcycleError if something is wrong.
    """
    found: list[UpcycleError] = []
    for check in checks:
        try:
            check()
        except UpcycleError as error:
            found += error.parts
    return found


def mistake_in_file(error: BaseException) -> UpcycleError | None:
    """Return an error that names the file and line of the user's code that failed; None if no user's file failed.

    Args:
        error: error that was caught when the file's code was called. Its cause may be the error that the file raised.
    """
    cause: BaseException | None = error
    while cause and not isinstance(cause, UpcycleError):
        places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(cause.__traceback__)]
        if isinstance(cause, SyntaxError) and cause.filename:
            places.append((cause.filename, cause.lineno))
        for file, line in reversed(places):
            if _is_of_a_user(file):
                what = cause.msg if isinstance(cause, SyntaxError) else cause
                got = f"raises {type(cause).__name__}: {what}"
                return UpcycleError(f"{file}, line {line}", kind="state", got=got, fix="correct the file")
        cause = cause.__cause__ or cause.__context__
    return None


def _is_of_a_user(file: str) -> bool:
    """Return whether a code file belongs neither to Python, nor to an installed package, nor to this package."""
    paths, package = sysconfig.get_paths(), Path(__file__).parent
    others = [Path(paths[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    others += [package, package.with_name("recipes")]
    return Path(file).is_file() and not any(Path(file).is_relative_to(folder) for folder in others)


def did_you_mean(name: str, valid: Iterable[str], *, prefix: str = "", cutoff: float = 0.6) -> str:
    """Return a sentence that proposes the closest valid name, or an empty text if none is close.

    Args:
        name: the name that does not exist.
        valid: the names that exist.
        prefix: text in front of the proposed name.
        cutoff: least similarity of the two names, 0 to 1, as `difflib` measures it.

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
    """An `UpcycleSpec` is wrong, or does not fit the model or the layout."""


class CheckpointError(UpcycleError):
    """A checkpoint is missing or truncated, has another architecture, or does not fit the model."""


class CheckoutError(UpcycleError, ImportError):
    """A part of the package is not installed, or belongs to another checkout."""


class LostError(UpcycleError):
    """A larger share of the input is unreadable than the settings allow, so nothing was finished."""

    exit_status = 1


class StageError(UpcycleError):
    """A stage of the pipeline cannot start or did not finish."""


class UnfinishedError(StageError):
    """A stage was started and did not finish; the command itself was correct."""

    exit_status = 1


class StageStopped(Exception):
    """A stage ended early by request; the same command resumes from the work that the stage kept."""

    #: Exit status of a process that ended early: EX_TEMPFAIL of sysexits.h.
    exit_status = 75

    @classmethod
    def with_steps(cls, stage: str, kept: int, wanted: int) -> StageStopped:
        """Return the exception for a training that kept some of its steps."""
        kept_text = f"{kept} of {wanted} steps are kept"
        return cls(f"stage '{stage}' stopped early: {kept_text}, and the same command resumes from there")
