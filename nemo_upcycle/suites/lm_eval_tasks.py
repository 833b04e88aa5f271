"""Load tasks of lm-eval and read their documents as questions and answers."""

from __future__ import annotations

import difflib
import logging
import re
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError


_LABEL_BEFORE = re.compile(r"^\s*(?:question|q|problem|passage|context)\s*:\s*", re.IGNORECASE)
_LABEL_WITHIN = re.compile(r"\n\s*(?:question|q|choices|options)\s*:[ \t]*", re.IGNORECASE)
_LABEL_AFTER = re.compile(r"\s*\b(?:answer|a)\s*:\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """One document of a task.

    Attributes:
        prompt: what lm-eval gives the model, without examples and description.
        stem: the prompt without labels such as "Question:", and without options it lists.
        options: the answers to choose from, if there are any.
        answers: the right ones; none where the data do not say.
    """

    prompt: str
    stem: str
    options: tuple[str, ...]
    answers: tuple[str, ...]


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> dict[str, list[Any]]:
    """Load tasks of lm-eval with their data.

    Args:
        names: tasks, groups or tags of lm-eval.
        include_path: a folder with task files of the user's own, which need none of lm-eval's, or None.

    Returns:
        For each name, its tasks, by their names.

    Raises:
        UpcycleError: lm-eval does not know a name, or the data of one cannot be fetched.

    Example:
        >>> load_tasks(["mmlu"])["mmlu"][0].task_name  # doctest: +SKIP
        'mmlu_abstract_algebra'
    """
    from lm_eval.tasks import TaskManager

    own = TaskManager(include_path=include_path, include_defaults=False)
    managers = [own] if set(names) <= set(own.all_tasks) else [own, _lm_evals_own()]
    check_task_names(names, [name for manager in managers for name in manager.all_tasks])
    loaded = {}
    for name in names:
        manager = next(manager for manager in managers if name in manager.all_tasks)
        try:
            with quiet():
                tasks = manager.load([name])["tasks"]
        except Exception as error:  # lm-eval passes on what its libraries raise, of a dozen kinds
            raise UpcycleError(
                f"data of lm-eval's task {name}",
                got=" ".join(str(error).split()),
                expected="a data set that the task can read",
                fix="run where the Hugging Face hub can be reached, once: the data stay in its cache",
            ) from error
        loaded[name] = [tasks[key] for key in sorted(tasks)]
    return loaded


@cache
def _lm_evals_own() -> Any:
    """Return the manager of the thousands of tasks that lm-eval brings; to read their files takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_task_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Check that lm-eval knows tasks.

    Raises:
        UpcycleError: it does not; the message names the closest of its thousands.
    """
    for task in tasks:
        if task not in known:
            close = ", ".join(difflib.get_close_matches(task, known))
            raise UpcycleError(
                "task",
                got=task,
                expected=f"a task of lm-eval{f' ({close}?)' if close else ''}",
                fix="see `lm-eval ls tasks`",
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Show only the errors of lm-eval's logger, because its advice does not apply here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def question_of(task: Any, document: Mapping[str, Any]) -> Question:
    """Return what a task asks with a document, and the answers."""
    prompt = task.doc_to_text(document)
    target = task.doc_to_target(document)
    choices = [str(choice) for choice in task.doc_to_choice(document)] if task.config.doc_to_choice else []
    if isinstance(prompt, int):  # each choice begins a sentence that the target ends
        return Question(choices[prompt], choices[prompt], (), (str(target),))
    stem, options = _without_options(prompt, choices)
    answers = [_answer(one, choices, options) for one in (target if isinstance(target, list) else [target])]
    for label, before in ((_LABEL_BEFORE, ""), (_LABEL_WITHIN, "\n"), (_LABEL_AFTER, "")):
        stem = label.sub(before, stem)
    return Question(prompt, stem, tuple(options), tuple(answer for answer in answers if answer is not None))


def _without_options(prompt: str, choices: list[str]) -> tuple[str, list[str]]:
    """Return the prompt up to the options that it lists by letters, and the options."""
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
