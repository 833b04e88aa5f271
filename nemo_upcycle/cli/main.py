"""The light command `nemo-upcycle`: import one module a command, only when it is used, and never NeMo."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

from nemo_upcycle.cli.output import Output, take_output
from nemo_upcycle.errors import UpcycleError, did_you_mean
from nemo_upcycle.package_info import __version__


#: name -> what it does; `nemo_upcycle/cli/NAME.py` has `HELP`, `add_arguments(parser)` and `run(args) -> exit status`
COMMANDS = {
    "plan": "what fits where, how fast, how long, how much",
    "data": "texts -> clean, tokenised training data",
    "convert": "dense checkpoint -> MoE Hugging Face folder",
    "verify": "dense folder against MoE folder: how equal are they",
    "export": "NeMo checkpoint -> Hugging Face folder",
    "evaluate": "checkpoint or Hugging Face folder -> scores",
    "report": "run folder -> report.md and plots",
    "doctor": "what is installed, what fits, what is missing",
}
_EPILOG = """example:
  nemo-upcycle convert models/Llama-3-8B models/Llama-3-8B-E8T2 --experts 8 --top-k 2

nemo-upcycle help COMMAND, or COMMAND --help: options and an example.
exit status: 0 done, or yes; 1 the answer is no; 2 bad usage or input."""
BAD_INPUT, INTERRUPTED, TERMINATED = 2, 130, 143


class _Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, with an example. A command is imported when its arguments are parsed."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if not (command := self.prog.partition(" ")[2]):
            return super().parse_known_args(args, namespace)
        module = importlib.import_module(f"nemo_upcycle.cli.{command}")
        self.description = module.HELP
        module.add_arguments(self)
        self.set_defaults(command=module, parser=self)
        _check_options(self, args)
        found, unknown = super().parse_known_args(args, namespace)
        if "overrides" in found:  # argparse takes them in one place only
            found.overrides += [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-") and word != "--"]
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        if wrong := re.fullmatch(r"argument (\S+): invalid (int|float) value: (.*)", message, re.DOTALL):
            message = f"{wrong[1]}: got {wrong[3]}, expected a {'whole ' if wrong[2] == 'int' else ''}number"
        examples = [line.strip() for line in (self.epilog or "").splitlines() if line.startswith(f"  {self.prog}")]
        raise UpcycleError(f"{message}. Fix: type, for example, `{examples[0]}`; options: {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 (the answer is no), 2 (bad usage or input), 130 or 143 (stopped)."""
    output = take_output()
    try:
        with _signals():
            return _run(list(sys.argv[1:] if argv is None else argv), output)
    except UpcycleError as error:
        sys.stderr.write(f"error: {error}\n")
    except OSError as error:
        sys.stderr.write(f"error: {_said(error)}\n")
    except ModuleNotFoundError as error:
        if (error.name or "nemo_upcycle").startswith("nemo_upcycle"):
            raise
        fix = "run `nemo-upcycle doctor`, which prints the command that adds it"
        sys.stderr.write(f"error: {error.name} is not installed. Fix: {fix}.\n")
    except KeyboardInterrupt as stop:
        sys.stderr.write("\nstopped; run again to go on\n")
        return TERMINATED if isinstance(stop, _Terminated) else INTERRUPTED
    return BAD_INPUT


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what Ctrl-C does, with an exit status of its own."""


@contextmanager
def _signals() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C; as a rank of torchrun leave it, which has to end a rank that waits for another."""

    def stop(*_: object) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread() or "LOCAL_RANK" in os.environ:
        yield
        return
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # silent until here: nemo_upcycle/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_FIXES = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some of your quota and run again",
    errno.EFBIG: "choose a file system that holds larger files, or raise the limit (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOTDIR: "a part of the path is a file: check the path",
}


def _said(error: OSError) -> UpcycleError:
    """Return an error of the operating system with a fix."""
    fix = _FIXES.get(error.errno or 0, "check the path and who may read and write there")
    return UpcycleError(
        str(error.filename or "file system"), got=error.strerror or error, expected="access and room", fix=fix
    )


def _run(argv: list[str], output: Output) -> int:
    description = "Turn a dense Llama into a Mixture-of-Experts model. Training runs through `nemo` itself."
    parser = _Parser(prog="nemo-upcycle", description=description, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"nemo-upcycle {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text)
    while argv[:1] == ["help"]:
        argv = [*argv[1:2], "--help"]
    if not argv:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    if argv[0] not in (*COMMANDS, "-h", "--help", "--version"):
        raise UpcycleError.unknown("command", argv[0], [*COMMANDS, "help"])
    args = parser.parse_args(argv)
    try:
        status = int(args.command.run(args))
    except UpcycleError as error:
        options = _options(args)
        raise error.renamed(lambda name: options.get(name, name)) from None
    if problem := output.problem():
        done = f"; what the command made in {args.output} is whole" if "output" in args else ""
        fix = f"write the answer elsewhere{done}"
        sys.stderr.write(f"error: {UpcycleError('standard output', got=problem, expected='room', fix=fix)}\n")
        return status if done else BAD_INPUT
    return status


def _options(args: argparse.Namespace) -> dict[str, str]:
    """Return the option that sets each argument. An argument has the name of the field that it sets.

    Without an option for the spec, an error is about a file's spec: its fields are not called as options.
    """
    actions = [action for action in args.parser._actions if action.option_strings]
    of_spec = {action.dest for action in actions if action.default is argparse.SUPPRESS}
    hidden = of_spec if of_spec.isdisjoint(vars(args)) else set()
    return {action.dest: action.option_strings[-1] for action in actions if action.dest not in hidden}


def _check_options(parser: argparse.ArgumentParser, argv: list[str]) -> None:
    """Refuse an unknown option and name the closest one, which argparse does not."""
    known = [option for action in parser._actions for option in action.option_strings]
    for word in argv[: argv.index("--") if "--" in argv else None]:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            names = [name.removeprefix("--") for name in known if name.startswith("--")]
            hint = did_you_mean(option.removeprefix("--"), names, prefix="--")
            raise UpcycleError(f"option '{option}' does not exist.{hint} Fix: see {parser.prog} --help.")
