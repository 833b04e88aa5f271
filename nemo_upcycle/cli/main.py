"""The light program `nemo-upcycle`: it imports only the module of the used command, and never NeMo."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from nemo_upcycle.errors import UpcycleError, did_you_mean
from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.checkout import require_one_checkout
from nemo_upcycle.utils.masking import without_secrets


#: name of a command -> its purpose. Each module `nemo_upcycle/cli/NAME.py` has `EPILOG` (examples, a blank line, and
#: further notes), `add_arguments(parser)` and `run(args) -> exit status`. The first example of `EPILOG` needs only the
#: demo's files.
COMMANDS = {
    "start": "a model and texts -> recipe, blend and forecast; with --yes a trained MoE and its report",
    "plan": "model and cluster -> layouts that fit, with memory, speed, duration and cost; needs no GPU",
    "data": "texts -> clean, decontaminated, tokenised training data (Megatron indexed datasets)",
    "chat": "conversations -> packed sequences for tuning, with the loss on the answers only",
    "fetch": "downloads of a run -> one folder, for machines without a network",
    "calibrate": "dense model and prompts -> calibration file for a router from prompts",
    "convert": "checkpoint -> MoE Hugging Face folder: Mixtral, or the class that can hold the model",
    "verify": "parent and MoE -> how the weights changed, and whether both compute the same function",
    "export": "NeMo or Megatron checkpoint, saved under any layout -> Hugging Face folder",
    "evaluate": "NeMo or Megatron checkpoint, or Hugging Face folder -> scores of lm-eval's tasks and held-out texts",
    "report": "run folder -> report.md, report.html, results.json and plots",
    "doctor": "this environment -> installed versions, whether they fit, and the command that adds missing ones",
}
_DESCRIPTION = """Turn a dense model into a Mixture-of-Experts model. These tools need neither NeMo nor a GPU.
For runs with NeMo or Megatron-Bridge, from import to report: nemo upcycle --help.

example:
  nemo-upcycle start asset://smollm2-135m         the demo's model and texts"""
_EPILOG = """nemo-upcycle COMMAND --help shows examples and options.
exit status: 0 done, or yes; 1 the answer is no; 2 bad usage or input, or the command failed."""
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help formatter that shows only required arguments in the usage, so that the examples are near the top."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any = None) -> None:
        wanted = [one for group in groups if group.required for one in group._group_actions]
        kept = [one for one in actions if one.required or not one.option_strings or one in [*wanted, *actions[:1]]]
        super().add_usage(usage, kept, [group for group in groups if group.required], prefix)


class _Parser(argparse.ArgumentParser):
    """Parser that reports a mistake in one line, with an example.

    The parser imports a command's module only when it parses the command's arguments.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=_Formatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not (command := self.prog.partition(" ")[2]):
            return super().parse_known_args(args, namespace)
        module = importlib.import_module(f"nemo_upcycle.cli.{command}")
        examples, _, self.epilog = module.EPILOG.partition("\n\n")
        self.description = f"{COMMANDS[command]}\n\n{examples}"
        module.add_arguments(self)
        self.add_argument("--json", action="store_true", help="one JSON object on stdout")
        self.set_defaults(command=module, parser=self)
        _check_options(self, args)
        namespace, unknown = super().parse_known_args(args, namespace)
        _refuse_empty(self, args, namespace)
        if "overrides" in namespace:  # argparse collects positional words only if they are adjacent
            namespace.overrides += [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-") and word != "--"]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        if wrong := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL):
            kind, number = ("a whole number", "8") if wrong[2] == "int" else ("a number", "0.5")
            raise UpcycleError(wrong[1], got=wrong[3], expected=kind, fix=f"write, for example, {wrong[1]} {number}")
        example = _examples(self.description or "")[0]
        raise UpcycleError(f"{message}. Type, for example, `{example}`; `{self.prog} --help` lists the options.")


def examples_of(command: str) -> list[str]:
    """List the examples in a command's help, without their explanations."""
    return _examples(importlib.import_module(f"nemo_upcycle.cli.{command}").EPILOG)


def _examples(text: str) -> list[str]:
    lines = [line.strip() for line in text.splitlines() if line.startswith("  ") and "nemo-upcycle " in line]
    return [line.split("    ")[0] for line in lines]


def _prepare_streams() -> None:
    """Replace closed streams by /dev/null, and escape characters that the terminal cannot show."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit status: 0, 1 (the answer is no), 2 (failed), 130 or 143 (stopped)."""
    _prepare_streams()
    try:
        with _signals():
            require_one_checkout()
            return _run(list(sys.argv[1:] if argv is None else argv))
    except UpcycleError as error:
        sys.stderr.write(f"error: {without_secrets(str(error))}\n")
        return error.exit_status
    except OSError as error:
        sys.stderr.write(f"error: {_format_os_error(error)}\n")
    except Exception as error:  # Python's own exit status 1 would mean that the answer is no
        sys.stderr.write(without_secrets(_unexpected(error)))
    except KeyboardInterrupt as stop:
        sys.stderr.write("\nstopped; run again to resume\n")
        return TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED
    return BAD_INPUT


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C but with a separate exit status."""


@contextmanager
def _signals() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, but not in a rank of torchrun.

    Under torchrun, SIGTERM must end a rank even while the rank waits for another rank.
    """

    def stop(*_: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or "LOCAL_RANK" in os.environ:
        yield
        return
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # set by cli/entry.py, to make Ctrl-C silent
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _unexpected(error: Exception) -> str:
    """Return the text for an unexpected error, with a traceback unless a package is missing."""
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing and not missing.startswith("nemo_upcycle"):
        fix = "Run `nemo-upcycle doctor`, which prints the command that adds it"
        return f"error: {missing} is not installed. {fix}.\n"
    lines, name = "".join(traceback.format_exception(error)), type(error).__name__
    return f"{lines}error: the command failed unexpectedly ({name}). Please report the lines above.\n"


_FIXES = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some of your quota and run again",
    errno.EFBIG: "choose a file system that holds larger files, or raise the limit (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "check the path: a part of it is a file",
}


def _format_os_error(error: OSError) -> UpcycleError:
    """Convert an error of the operating system to an `UpcycleError` with a fix."""
    fix = _FIXES.get(error.errno or 0, "check the path and its permissions")
    return UpcycleError(
        str(error.filename or "The file system"),
        kind="state",
        got=f"cannot be used: {error.strerror or error}",
        fix=fix,
    )


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(prog="nemo-upcycle", description=_DESCRIPTION, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"nemo-upcycle {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    return parser


def _run(argv: list[str]) -> int:
    parser = command_parser()
    while argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    if argv[0] not in (*COMMANDS, "-h", "--help", "--version"):
        raise UpcycleError.unknown("command", argv[0], [*COMMANDS, "help"])
    args = parser.parse_args(argv)
    try:
        return int(args.command.run(args))
    except UpcycleError as error:
        options = _options(args)
        raise error.renamed(lambda name: options.get(name, name)) from None


def _options(args: argparse.Namespace) -> dict[str, str]:
    """Map each argument to its option. An argument has the same name as the field that it sets.

    If the command line sets no field of the spec, the spec comes from a file. Then errors name the fields of the spec,
    not the options.
    """
    actions = [action for action in args.parser._actions if action.option_strings]
    of_spec = {action.dest for action in actions if action.default is argparse.SUPPRESS}
    hidden = of_spec if of_spec.isdisjoint(vars(args)) else set()
    return {action.dest: action.option_strings[-1] for action in actions if action.dest not in hidden}


def _refuse_empty(parser: argparse.ArgumentParser, argv: Sequence[str], namespace: argparse.Namespace) -> None:
    """Refuse an empty name, because it would mean the current folder."""
    if "" not in argv and not any(word.startswith("--") and word.endswith("=") for word in argv):
        return
    for action in parser._actions:
        value = getattr(namespace, action.dest, None)
        if value == "" or (value == Path() and "." not in argv):
            name = action.option_strings[-1] if action.option_strings else action.metavar or action.dest
            fix = "give a name, or . for the current folder" if isinstance(value, Path) else "give it a value"
            raise UpcycleError(str(name), kind="missing", got="is empty", fix=fix)


def _check_options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Refuse an unknown option, and name the closest known option, which argparse does not do."""
    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv[: argv.index("--") if "--" in argv else None]:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            names = [name.removeprefix("--") for name in known if name.startswith("--")]
            hint = did_you_mean(option.removeprefix("--"), names, prefix="--")
            raise UpcycleError(f"option '{option}' does not exist.{hint} See {parser.prog} --help.")
