"""Read the configuration of a suite: `conf/evaluation/NAME.yaml`, or another file of the same form."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemo_upcycle.data.suites.local_tasks import LOCAL_TASKS, is_answers, is_text
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import as_dataclass, is_conf_file, read_conf
from nemo_upcycle.utils.validation import is_whole, one_of, valid


#: Data types to evaluate in.
DTYPES = ("float32", "bfloat16", "float16")
#: Backends that compute the scores.
BACKENDS = ("auto", "hf", "vllm", "megatron")


@dataclass
class QuestionsConfig:
    """Limits for the multiple-choice questions to take (None: no limit), and how many to keep as examples."""

    per_subject: int | None = None
    total: int | None = None
    max_characters: int | None = None
    examples: int = 0


@dataclass
class HeldoutConfig:
    """Size of the windows of held-out documents, and how many windows and answers to take (None: all)."""

    window_bytes: int = 4096
    windows: int | None = None
    answers: int | None = None


@dataclass
class Published:
    """A published table: `columns` maps `task/metric` to one value in percent for each of `models`."""

    source: str
    models: list[str]
    columns: dict[str, list[float]]


@dataclass
class SuiteConfig:
    """The configuration of a suite; `conf/evaluation/demo.yaml` explains every key."""

    tasks: dict[str, list[int]]
    local: bool = True
    include_path: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    chat_template: bool = False
    strict: bool = False
    seed: int = 1234
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    batch_size: int | str = field(
        default=8, metadata=valid("a whole number from 1 on, or auto", lambda n: n == "auto" or is_whole(n, 1))
    )
    dtype: str = field(default="float32", metadata=one_of(DTYPES))
    backend: str = field(default="auto", metadata=one_of(BACKENDS))
    published: Published | None = None


def read_suite_config(name: str | Path) -> SuiteConfig:
    """Read a suite configuration.

    Args:
        name: name of a packaged suite (`demo`, `offline`, `paper`, ...), or path of a YAML file.

    Raises:
        UpcycleError: there is no such configuration, or it has an unknown key or task or a value of the wrong type.

    Example:
        >>> read_suite_config("demo").heldout.window_bytes
        1024
    """
    content, path, folder = read_conf("evaluation", name, "evaluation suite")
    config = as_dataclass(str(path), content, SuiteConfig, "evaluation")
    if config.include_path is not None:
        config.include_path = str(folder.absolute() / Path(config.include_path).expanduser())
        if config.local or not Path(config.include_path).is_dir():
            raise UpcycleError(
                f"{path}: include_path",
                kind="refused",
                got="needs local: false" if config.local else f"names {config.include_path}, which is not a folder",
                fix="set local: false"
                if config.local
                else "give a folder with task files for lm-eval, relative to this file",
            )
    _check_not_local(config, path, folder)
    for task, shots in config.tasks.items() if config.local else ():
        if task not in LOCAL_TASKS:
            raise UpcycleError.unknown(f"{path}: local task", task, LOCAL_TASKS)
        asks = not (is_text(task) or is_answers(task))
        most = config.questions.examples if asks else 0
        if not shots or not all(is_whole(number, 0) and number <= most for number in shots):
            raise UpcycleError(
                f"{path}: tasks.{task}",
                got=shots,
                expected=f"numbers of examples from 0 to {most}",
                fix="write [0]" if not asks else "raise questions.examples (examples kept of each subject)",
            )
    return config


def _check_not_local(config: SuiteConfig, path: Path, folder: Path) -> None:
    """Check the settings that only lm-eval's own tasks may have, and make the paths of their files absolute."""
    if config.local and (config.files or config.chat_template):
        raise UpcycleError(
            f"{path}: {('files' if config.files else 'chat_template')}",
            kind="refused",
            got="cannot be combined with local: true, because local tasks bring their own data and prompts",
            fix="set local: false, or omit it",
        )
    for task, file in config.files.items():
        config.files[task] = str(folder.absolute() / Path(file).expanduser())
        shots = config.tasks.get(task)
        if shots != [0] or not Path(config.files[task]).is_file():
            raise UpcycleError(
                f"{path}: files.{task}",
                kind="state",
                got=f"needs tasks.{task}: [0], but the value is {shots}"
                if shots != [0]
                else f"names {file}, which is not a file",
                fix="write [0], because a file has no examples"
                if shots != [0]
                else "give a file of JSON lines, relative to this file",
            )


def folders_of_suite(name: str | Path, config: SuiteConfig) -> list[Path]:
    """Return the folders on this machine from which a suite reads its YAML file and its task files.

    Args:
        name: name or path that the configuration was read from.
        config: configuration of the suite.
    """
    here = [Path(name).absolute().parent] if is_conf_file(str(name)) else []
    own = [Path(config.include_path)] if config.include_path else []
    return [*here, *own, *sorted({Path(file).parent for file in config.files.values()})]
