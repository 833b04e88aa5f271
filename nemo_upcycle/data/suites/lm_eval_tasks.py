"""Load tasks of lm-eval and read their documents as questions and answers."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.conf import packaged
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.writers import yaml_text


#: Beginning of the text of a `TaskDataError`, before the reason.
_CANNOT = "are not available: "
#: Maximum length of a library's message about a data set that it cannot load.
_MOST_CHARACTERS = 300
_REACH_HUB = "run where the Hugging Face hub can be reached, once: the data stay in its cache"
#: Task of instructions that code can check (`lm_eval/tasks/ifeval`), and its instruction that counts sentences.
IFEVAL, _SENTENCES = "ifeval", "length_constraints:number_sentences"
#: Task -> packages that its code imports beyond lm-eval's own requirements; `pip install "lm-eval[TASK]"` installs
#: these packages.
_IMPORTED = {IFEVAL: ("langdetect", "immutabledict", "nltk")}
#: `datasets` calls the only split of a single file `train`.
_ASKED_OF_A_FILE = {"dataset_path": "json", "dataset_name": None, "training_split": None, "validation_split": None}
_ASKED_OF_A_FILE |= {"test_split": "train", "fewshot_split": None}
_LABEL_BEFORE = re.compile(r"^\s*(?:question|q|problem|passage|context)\s*:\s*", re.IGNORECASE)
_LABEL_WITHIN = re.compile(r"\n\s*(?:question|q|choices|options)\s*:[ \t]*", re.IGNORECASE)
_LABEL_AFTER = re.compile(r"\s*\b(?:answer|a)\s*:\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class TaskQuestion:
    """One document of a task.

    Attributes:
        prompt: text that lm-eval gives the model, without examples and description.
        stem: prompt without labels such as "Question:", and without the listed options.
        options: answers to choose from, if there are any.
        answers: right answers; empty if the data have none.
    """

    prompt: str
    stem: str
    options: tuple[str, ...]
    answers: tuple[str, ...]


class TaskDataError(UpcycleError):
    """The data of a task cannot be loaded: no network, a data set that is a script, a missing split, ..."""


@dataclass(frozen=True)
class LoadedTask:
    """The tasks that one of lm-eval's names stands for, with their data.

    Attributes:
        tasks: tasks sorted by name: a single task, or all tasks of a group or tag.
        group: lm-eval's object for a group, which weighs its tasks; None for a task or tag.
    """

    tasks: list[Any]
    group: Any = None


def load_tasks(
    names: Sequence[str], include_path: str | Path | None = None, files: Mapping[str, str] | None = None
) -> dict[str, list[Any]]:
    """Load tasks, groups or tags of lm-eval, and keep their data in the cache of the Hugging Face hub.

    Args:
        names: tasks, groups or tags. They are defined by lm-eval, by the user's files or by this package's files;
            definitions in the user's files and in this package's files take precedence.
        include_path: a folder with task files of the user's own, or None.
        files: files of tasks, see `load_available_tasks`.

    Returns:
        Name -> its tasks, sorted by name.

    Raises:
        TaskDataError: the data of a task cannot be loaded.
        UpcycleError: lm-eval does not know a name.

    Example:
        >>> load_tasks(["mmlu"])["mmlu"][0].task_name  # doctest: +SKIP
        'mmlu_abstract_algebra'
    """
    managers = _managers(names, include_path)
    return {name: _load(name, managers, (files or {}).get(name)).tasks for name in names}


def load_available_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    *,
    files: Mapping[str, str] | None = None,
    strict: bool = False,
) -> tuple[dict[str, LoadedTask], dict[str, str]]:
    """Load the tasks, groups or tags that can be loaded, and warn at once about the others.

    Args:
        names: tasks, groups or tags, see `load_tasks`.
        include_path: folder with the user's task files, see `load_tasks`.
        files: task -> file of JSON lines that is read instead of the task's data set; each line has the form of the
            data set's rows.
        strict: whether to fail at the first name that cannot be loaded.

    Returns:
        Name -> loaded task, and name -> reason why it cannot be loaded.

    Raises:
        TaskDataError: no name can be loaded, or `strict` is set and some name cannot be loaded.
        UpcycleError: lm-eval does not know a name.
    """
    managers = _managers(names, include_path)
    loaded: dict[str, LoadedTask] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            loaded[name] = _load(name, managers, (files or {}).get(name))
        except TaskDataError as error:
            if strict:
                raise
            missing[name] = str(error.got).removeprefix(_CANNOT)
            show_messages().warning("%s is not scored, because its data %s", name, error.got)
    if not loaded:
        raise TaskDataError(
            f"Data of {', '.join(names)}",
            kind="state",
            got=f"are not available ({next(iter(missing.values()), 'no task is named')})",
            fix=_REACH_HUB,
        )
    return loaded, missing


def check_needs(names: Iterable[str], files: Mapping[str, str]) -> None:
    """Check that this machine has the packages and files that tasks need besides their data.

    Args:
        names: names of tasks.
        files: files of tasks, see `load_available_tasks`; if a file has no question about sentences, NLTK's punkt_tab
            is not needed.

    Raises:
        UpcycleError: a package or file is missing.
    """
    for name in names:
        absent = [package for package in _IMPORTED.get(name, ()) if importlib.util.find_spec(package) is None]
        if absent:
            raise UpcycleError(
                f"Task {name} of lm-eval",
                kind="missing",
                got=f"needs packages that are not installed: {', '.join(absent)}",
                fix=f'run: pip install "lm-eval[{name}]"',
            )
        if name == IFEVAL and not _counts_sentences():
            text = Path(files[name]).read_text(encoding="utf-8") if name in files else _SENTENCES
            if _SENTENCES in text:
                raise UpcycleError(
                    f"Task {name} of lm-eval",
                    kind="missing",
                    got="needs NLTK's punkt_tab to count sentences, and NLTK finds no tokenizers/punkt_tab",
                    fix="run `python -m nltk.downloader punkt_tab` where there is a network, and copy ~/nltk_data",
                )


def _counts_sentences() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _managers(names: Sequence[str], include_path: str | Path | None) -> list[Any]:
    """Return lm-eval's managers that know the names: one for our and the user's files, and one for lm-eval's tasks."""
    from lm_eval.tasks import TaskManager

    folders = [packaged("evaluation") / "tasks", *([Path(include_path)] if include_path else [])]
    with quiet():
        own = TaskManager(include_path=folders, include_defaults=False)
    managers = [own] if set(names) <= set(own.all_tasks) else [own, _lm_evals_own()]
    try:
        check_task_names(names, [name for manager in managers for name in manager.all_tasks])
    except UpcycleError as error:
        if include_path:  # lm-eval skips files that are not valid YAML
            error.fix += f", or define it in a file of valid YAML in {include_path}"
        raise
    return managers


def _load(name: str, managers: Sequence[Any], file: str | None = None) -> LoadedTask:
    check_needs([name], {name: file} if file else {})
    manager = next(manager for manager in managers if name in manager.all_tasks)
    try:
        with quiet(), TemporaryDirectory() as scratch:
            loaded = manager.load([name if file is None else _over_file(manager, name, file, Path(scratch))])
    except Exception as error:  # lm-eval passes on a dozen kinds of errors of its libraries
        got, fix = _reason(error)
        raise TaskDataError(f"Data of lm-eval task {name}", kind="state", got=_CANNOT + got, fix=fix) from error
    return LoadedTask([loaded["tasks"][key] for key in sorted(loaded["tasks"])], loaded["groups"].get(name))


def _over_file(manager: Any, name: str, file: str, folder: Path) -> str:
    """Write a definition of the task that reads JSON lines instead of its data set, and return its path."""
    defined = {"include": str(manager.task_index[name].yaml_path), "task": name, **_ASKED_OF_A_FILE}
    path = folder / "task.yaml"
    path.write_text(yaml_text(defined | {"dataset_kwargs": {"data_files": file}}), encoding="utf-8")
    return str(path)


def _reason(error: Exception) -> tuple[str, str]:
    """Return in one line why a task's data cannot be loaded, and the fix."""
    text = " ".join(str(error).split())
    if "scripts are no longer supported" in text:
        got = f"a data set that is a script, {text.rpartition(' ')[2]}, which `datasets` 4.0 and newer do not run"
        return got, "define the task over files without a script, in a folder that `include_path` names"
    if isinstance(error, KeyError):
        return f"they have no {text}, a split or column that the task names", "update lm-eval, or define the task anew"
    if "is a gated dataset" in text:
        return text.rstrip("."), "accept its terms on the hub, then `hf auth login`, or set HF_TOKEN"
    cause: BaseException | None = error
    while cause is not None:
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        if status >= 500:
            return f"status {status} of the Hugging Face hub", "run again: fetched files are kept"
        cause = cause.__cause__ or cause.__context__
    got = f"{type(error).__name__}: {text}"[:_MOST_CHARACTERS]
    return got, f"{_REACH_HUB}; or correct the file that defines the task"


@cache
def _lm_evals_own() -> Any:
    """Return the manager of lm-eval's own tasks; reading their thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_task_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Check that lm-eval knows tasks.

    Raises:
        UpcycleError: lm-eval does not know a task; the message names the closest known task.
    """
    for task in tasks:
        if task not in known:
            close = ", ".join(difflib.get_close_matches(task, known))
            raise UpcycleError(
                f"Task {task}",
                kind="state",
                got="does not exist in lm-eval" + (f" (did you mean {close}?)" if close else ""),
                fix="see `lm-eval ls tasks`",
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Hide lm-eval's progress bars and its log, except errors, because its advice does not apply here."""
    from lm_eval.api import model, task

    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with temporarily_set(model, "tqdm", _without_bar), temporarily_set(task, "tqdm", _without_bar):
            yield
    finally:
        logger.setLevel(level)


def _without_bar(items: Iterable[Any], **settings: Any) -> Iterable[Any]:
    """Replace tqdm without a bar, because `ProgressLine` shows the progress of an evaluation."""
    return items


def question_of(task: Any, document: Mapping[str, Any]) -> TaskQuestion:
    """Return the question that a task asks with a document, and its answers."""
    prompt = task.doc_to_text(document)
    target = task.doc_to_target(document)
    choices = [str(choice) for choice in task.doc_to_choice(document)] if task.config.doc_to_choice else []
    if isinstance(prompt, int):  # each choice is the start of a sentence, the target is its end
        return TaskQuestion(choices[prompt], choices[prompt], (), (str(target),))
    stem, options = _without_options(prompt, choices)
    answers = [_answer(one, choices, options) for one in (target if isinstance(target, list) else [target])]
    for label, before in ((_LABEL_BEFORE, ""), (_LABEL_WITHIN, "\n"), (_LABEL_AFTER, "")):
        stem = label.sub(before, stem)
    return TaskQuestion(prompt, stem, tuple(options), tuple(answer for answer in answers if answer is not None))


def _without_options(prompt: str, choices: list[str]) -> tuple[str, list[str]]:
    """Return the prompt up to its list of lettered options, and the options."""
    are_letters = bool(choices) and all(len(choice.strip()) == 1 for choice in choices)
    letters = [choice.strip() for choice in choices] if are_letters else string.ascii_uppercase[: len(choices)]
    matches = [re.search(rf"^[ \t]*\(?{re.escape(letter)}[.):](.*)$", prompt, re.MULTILINE) for letter in letters]
    lines = [match for match in matches if match]
    if not lines or len(lines) < len(choices):
        return prompt, [] if are_letters else choices
    return prompt[: lines[0].start()], [line.group(1).strip() for line in lines] if are_letters else choices


def _answer(target: Any, choices: list[str], options: list[str]) -> str | None:
    if isinstance(target, str) and target.strip() in choices:
        target = choices.index(target.strip())
    if not isinstance(target, int) or not choices:
        return str(target)
    texts = options or choices
    return texts[target] if 0 <= target < len(texts) else None
