"""The command lines of `nemo upcycle pipeline` and similar commands.

NeMo-Run answers a mistake with the whole configuration and status 1. These contexts answer with status 2 and one
message that names the argument and the closest match. Status 1 is for a stage that did not finish.
"""

import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import catalogue
import fiddle as fdl
import nemo_run as run
from nemo_run.cli.api import EXECUTOR_CLASSES
from nemo_run.cli.cli_parser import parse_cli_args, parse_factory
from nemo_run.cli.lazy import LazyEntrypoint
from nemo_run.config import get_type_namespace

from nemo_upcycle.errors import UpcycleError, did_you_mean, mistake_in_file
from nemo_upcycle.pipeline.answers import answered, of_another_trainer
from nemo_upcycle.pipeline.executors.site_file import executor_names, is_described, read_executor
from nemo_upcycle.pipeline.markers import RETIRED
from nemo_upcycle.pipeline.parser import command_options, parsing
from nemo_upcycle.trainers.settings import class_name, of_class
from nemo_upcycle.utils.attributes import temporarily_set


#: Argument that each option of the pipeline sets.
OPTIONS = {
    "--from": "from_stage",
    "--until": "until_stage",
    "--only": "only_stage",
    "--render": "render",
    "--rewind": "rewind",
    "--skip-steps": "skip_steps",
}


class CheckedContext(run.cli.RunContext):
    """Command line that answers a mistake with one message and status 2."""

    #: Options that NeMo-Run does not have, with the argument that each option sets, and names of additional executors.
    options: ClassVar[Mapping[str, str]] = {}
    executors: ClassVar[frozenset[str]] = frozenset()
    #: Facts about the typed command: whether it has `--verbose`, and the value of each argument.
    verbose = False
    typed: Mapping[str, str] = types.MappingProxyType({})

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        """Check the arguments, then let NeMo-Run parse and execute them."""
        self.verbose = not {"-v", "--verbose"}.isdisjoint(sys.argv)  # NeMo-Run hides this option
        self.typed = dict(word.partition("=")[::2] for word in args)
        with answered():
            args = self.arguments(args)
            _check_words(args, self.options)
            super().cli_execute(fn, args, entrypoint_type)

    def arguments(self, words: list[str]) -> list[str]:
        """Return the words of a command line in the form that NeMo-Run accepts."""
        return words

    def parse_args(self, args: list[str], lazy: bool = False) -> Any:
        """Parse the arguments of the executor."""
        try:
            with parsing():
                return super().parse_args(args, lazy)
        except Exception as error:
            name = next((word.partition("=")[2] for word in args if word.startswith("executor=")), None)
            names = {name for kind in EXECUTOR_CLASSES for name in factories(kind)} | self.executors
            if name and name not in names:
                raise UpcycleError.unknown("run.executor", name, names) from None
            raise UpcycleError(f"run.{' run.'.join(args)}: {_first_line(error)}.") from None

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> Any:
        """Parse the arguments of the task."""
        try:
            with parsing():
                return super().parse_fn(fn, args, **default_kwargs)
        except Exception as error:
            raise self._explained(fn, args, error) from None

    def _explained(self, fn: Any, args: list[str], error: Exception) -> Exception:
        """Return an error that names the argument at which NeMo-Run failed, or the mistake in the user's file."""
        if mistake := mistake_of(str(self.factory)):
            return mistake
        try:
            with parsing():
                config = LazyEntrypoint(fn, factory=self.factory).resolve(ctx=self)
        except UpcycleError as cause:
            return getattr(cause, "proxy_base_exception", cause)
        except Exception as cause:
            return self._explained_factory(fn, cause)
        try:
            with parsing():
                overrides = LazyEntrypoint(fn, factory=self.factory, yaml=self.yaml, overwrites=args)._args_
        except Exception as cause:
            return UpcycleError(f"{_first_line(cause)}.")
        return _first_bad_override(config, overrides) or UpcycleError(f"{_first_line(error)}.")

    def _explained_factory(self, fn: Any, error: Exception) -> UpcycleError:
        name, _, arguments = str(self.factory).partition("(")
        known = factories(fn)
        if name not in known:
            return of_another_trainer(name) or UpcycleError.unknown(f"factory of {fn.__name__}", name, known)
        overrides = [tuple(map(str.strip, word.partition("="))) for word in arguments.rstrip(")").split(",") if word]
        bad_override = _first_bad_override(run.Partial(known[name]), overrides, where=f"argument of {name}")
        return bad_override or UpcycleError(f"factory {self.factory}: {_first_line(error)}.")


#: Sentence in the help that explains the difference between the package's two commands.
_TOOLS = "(For runs with NeMo or Megatron-Bridge. Quick tools: nemo-upcycle --help.)"


def entrypoint(context: type[CheckedContext]) -> Callable[[Any], Any]:
    """Register a command of `nemo upcycle`. The list of commands shows the first paragraph of each help text.

    Args:
        context: class that reads the command line.
    """

    def register(function: Any) -> Any:
        first, *others = inspect.cleandoc(function.__doc__.partition("Args:")[0]).split("\n\n")
        about = "\n\n".join([f"{first} {_TOOLS}", *others])
        return run.cli.entrypoint(function, namespace="upcycle", type="experiment", run_ctx_cls=context, help=about)

    return register


class PipelineContext(CheckedContext):
    """Command line that passes recipes to the pipeline as configurations.

    NeMo-Run would build the recipes in the launching process.
    """

    options: ClassVar[Mapping[str, str]] = OPTIONS
    executors = frozenset(executor_names())

    def arguments(self, words: list[str]) -> list[str]:
        """Process options that NeMo-Run does not know, such as `--from STAGE`, and an executor that a file describes.

        NeMo-Run would remove every `run.` and `executor.` from values, as in `run.executor=my-run.yaml`.
        """
        words = pipeline_arguments(words, self.options)
        given = [word.partition("=")[2] for word in words if word.startswith("run.executor=")]
        self._described = given[-1] if given and is_described(given[-1]) else ""
        self._overrides: list[str] = []
        if not self._described:
            return words
        own = [word for word in words if re.match(r"run\.executor[.=]", word)]
        _check_words(own)
        self._overrides = [word.removeprefix("run.executor.") for word in own if word.startswith("run.executor.")]
        return [word for word in words if word not in own]

    def parse_args(self, args: list[str], lazy: bool = False) -> Any:
        """Parse the arguments of the executor, or build the executor that a file describes."""
        rest = super().parse_args(args, lazy)
        if self._described:
            self.executor = read_executor(self._described, self._overrides)
        return rest

    def without_settings(self, beginnings: tuple[str, ...]) -> Any:
        """Parse the command line again without its YAML file and some settings; return None if it has neither.

        Args:
            beginnings: prefixes of the settings to omit.
        """
        fn, words = self._parsed
        rest = [word for word in words if not word.startswith(beginnings)]
        if rest == words and not self.yaml:
            return None
        with temporarily_set(self, "yaml", None):
            return self.parse_fn(fn, rest)

    def confirm(self) -> bool:
        """Ask whether to start, unless `--yes` was given."""
        return bool(self._should_continue(self.skip_confirmation))

    def _execute_experiment(self, fn: Any, experiment_args: list[str]) -> None:
        if self.to_yaml or self.to_toml or self.to_json:
            raise UpcycleError(
                "--to-yaml, --to-toml, --to-json",
                kind="refused",
                got="are options of NeMo-Run that the pipeline does not support",
                fix="omit these options: a run keeps its recipes in DIR/recipes",
            )
        task = self.parse_fn(fn, experiment_args)
        _check_complete(fn, task)
        self._parsed = fn, experiment_args
        fn(self, **{name: value for name, value in task.__arguments__.items() if name != "ctx"})


def factories(target: Any) -> dict[str, Any]:
    """Return the factories that are registered for a function or a class, by name."""
    return {keys[1]: factory for keys, factory in catalogue._get_all((get_type_namespace(target),)).items()}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")


def mistake_of(factory: str) -> UpcycleError | None:
    """Find the mistake in the user's file that made NeMo-Run fail to call a factory; None if there is none.

    NeMo-Run reports an error in the file as a name that does not exist.

    Args:
        factory: typed text: `module.function`, with or without arguments.
    """
    module = factory.partition("(")[0].rpartition(".")[0]
    try:
        importlib.import_module(module)
        with parsing():
            parse_factory(object, "", object, factory)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            return mistake_in_file(error)
        fix = f"set PYTHONPATH to the folder of {error.name}.py"
        return UpcycleError(
            f"Factory {factory}", kind="missing", got=f"needs the module {error.name}, which is not found", fix=fix
        )
    except Exception as error:
        return mistake_in_file(error)
    return None


def pipeline_arguments(words: Sequence[str], options: Mapping[str, str] = OPTIONS) -> list[str]:
    """Replace a command's own options by arguments, and return all words.

    Raises:
        UpcycleError: an option has no value.

    Example:
        >>> pipeline_arguments(["dir=runs/first", "--until", "data"])
        ['dir=runs/first', 'until_stage=data']
    """
    arguments, rest = [], iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option not in options:
            arguments.append(word)
            continue
        given = value if equals else next(rest, "")
        if not given or given.startswith("-"):
            examples = {"--render": "FOLDER", "--grid": "laptop", "--rewind": "9000", "--skip-steps": "9400:9460"}
            example = examples.get(option, "data")
            raise UpcycleError(option, kind="missing", got="has no value", fix=f"write {option} {example}")
        arguments.append(f"{options[option]}={given}")
    return arguments


def _check_words(words: Sequence[str], own: Iterable[str] = ()) -> None:
    """Refuse words that NeMo-Run ignores: an unknown option, a word that sets nothing, the first of two values."""
    options = [*command_options(), *own]
    given: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            raise UpcycleError.unknown("option", name, options)
        if not (name and equals and value):
            raise UpcycleError(
                f"Argument '{word}'",
                kind="state",
                got="is not NAME=VALUE",
                fix="write NAME=VALUE without blanks, for example dir=runs/first",
            )
        if name in given:
            option = next((option for option, argument in OPTIONS.items() if argument == name), name)
            raise UpcycleError(
                f"Argument '{option}'",
                kind="state",
                got=f"is given twice: {given[name]} and {value}",
                fix="omit one of them",
            )
        if re.fullmatch(r"[\w.\[\]]+", name):  # other words, such as NAME+=VALUE, may follow
            given[name] = value


def _check_complete(fn: Any, task: Any) -> None:
    """Check that every argument without a default was given."""
    parameters = inspect.signature(fn).parameters.values()
    needed = [parameter.name for parameter in parameters if parameter.default is inspect.Parameter.empty]
    if missing := [name for name in needed if name != "ctx" and name not in task.__arguments__]:
        raise UpcycleError(
            "Arguments",
            kind="missing",
            got=f"are missing: {', '.join(missing)}",
            fix=f"name a factory that gives them: --factory {next(iter(factories(fn)), 'NAME')}",
        )


def _first_bad_override(config: Any, overrides: Any, where: str = "setting") -> UpcycleError | None:
    """Return the error of the first override (key, operator, value) that NeMo-Run cannot apply; None if all apply."""
    for key, operator, value in overrides:
        try:
            with parsing():
                parse_cli_args(config, [f"{key}{operator}{value}"])
        except Exception as cause:
            return _override_error(config, str(key), str(value), cause, where)
    return None


def _override_error(config: Any, key: str, value: str, error: Exception, where: str) -> UpcycleError:
    """Return the error of an override: about the first name that does not exist, or else about the value."""
    at, so_far = config, ""
    parts = key.split(".")
    for part in parts:
        name, *indices = re.findall(r"[^\[\]]+", part) or [part]
        is_list = isinstance(at, list)  # callbacks, which are named by their classes
        names = [class_name(one) for one in at] if is_list else []
        names += [one for one in dir(at) if not one.startswith("_")] if isinstance(at, fdl.Buildable) else []
        if name not in names:
            if name in RETIRED:
                return UpcycleError(f"{where} '{key}' was removed in 0.3.0. It changed no result. Omit it.")
            owner = "none of these callbacks" if is_list else f"no setting of {class_name(at)}"
            hint = did_you_mean(name, names, prefix=so_far)
            valid = f" Valid: {', '.join(sorted(names))}." if 0 < len(names) <= 12 else ""
            return UpcycleError(f"{where} '{key}' does not exist: '{name}' is {owner}.{hint}{valid}")
        if part is parts[-1]:
            break
        at, so_far = of_class(at, name) if is_list else getattr(at, name), f"{so_far}{part}."
        for index in indices:
            try:
                at = at[int(index)]
            except (ValueError, IndexError, TypeError):
                return UpcycleError(
                    f"{where} '{key}'",
                    got=f"[{index}]",
                    expected="the number of an item in the list, counted from 0",
                    fix="correct the number",
                )
    parameter = inspect.signature(at.__fn_or_cls__).parameters.get(name)  # None: the class takes **kwargs
    kind = parameter.annotation if parameter else Any
    expected = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind).replace("typing.", "")
    if "Partial" in expected and (mistake := mistake_of(value)):  # the value is a recipe
        return mistake
    if kind in (inspect.Parameter.empty, Any):
        return UpcycleError(f"{where} '{key}': {_first_line(error)}.")
    now = getattr(at, name, None)
    fix = f"write, for example, {key}={now}" if isinstance(now, int | float | str | None) else f"set {key}.NAME=VALUE"
    return UpcycleError(f"{where} '{key}'", got=f"'{value}'", expected=expected, fix=fix)
