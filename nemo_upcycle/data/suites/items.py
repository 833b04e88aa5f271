"""List the items that suites ask, in all forms in which a text may contain them."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.suites.lm_eval_tasks import load_tasks, question_of
from nemo_upcycle.data.suites.suite import choose_questions, local_questions
from nemo_upcycle.data.suites.suite_config import SuiteConfig


@dataclass(frozen=True)
class Item:
    """One item of an evaluation set.

    Attributes:
        name: name of the evaluation set.
        id: id of the item in its set.
        renderings: forms in which a text may contain the item.
    """

    name: str
    id: str
    renderings: tuple[str, ...]


def suite_items(config: SuiteConfig, without: Collection[str] = ()) -> Iterator[Item]:
    """Yield the items that a suite asks, in a fixed order.

    The held-out documents of a suite are not items: they come from the blend itself, which keeps them out of training.

    Args:
        config: configuration of the suite. A suite of lm-eval's own tasks needs the Hugging Face hub, or its cache.
        without: names of lm-eval's tasks to omit.

    Raises:
        UpcycleError: a task is unknown, or its data cannot be fetched.
    """
    if not config.local:
        names = [name for name in config.tasks if name not in without]
        yield from lm_eval_items(names, config.include_path, config.files)
    else:
        numbered = [{**row, "number": number} for number, row in enumerate(local_questions(config))]
        for row in choose_questions(numbered, config.questions, config.seed):
            forms = renderings(row["question"], row["choices"], [row["choices"][row["answer"]]])
            yield Item("mmlu", f"{row['subject']}/{row['number']}", forms)


def lm_eval_items(
    names: Sequence[str], include_path: str | Path | None = None, files: Mapping[str, str] | None = None
) -> Iterator[Item]:
    """Yield the documents that lm-eval's tasks evaluate, from the test split or else the validation split.

    Args:
        names: tasks or groups; each is an evaluation set, `lm-eval/NAME`.
        include_path: a folder with task files of the user's own, or None.
        files: files of tasks, see `load_tasks`.

    Raises:
        UpcycleError: a task is unknown, or its data cannot be fetched.
    """
    for name, tasks in load_tasks(names, include_path, files).items():
        for task in tasks:
            for number, document in enumerate(task.eval_docs):
                yield Item(set_name(name), f"{task.task_name}/{number}", _forms(task, document))


def set_name(task: str) -> str:
    """Return the name of the evaluation set of an lm-eval task.

    Example:
        >>> set_name("piqa")
        'lm-eval/piqa'
    """
    return f"lm-eval/{task}"


def _forms(task: Any, document: Mapping[str, Any]) -> tuple[str, ...]:
    question = question_of(task, document)
    stems = [question.stem]
    if isinstance(document.get("question"), str):  # the prompt may have a passage or examples before the question
        stems.append(document["question"])
    prompts = (f"{question.prompt} {answer}" for answer in question.answers or ("",))
    return (*(form for stem in stems for form in renderings(stem, question.options, question.answers)), *prompts)


def renderings(question: str, options: Sequence[str], answers: Sequence[str]) -> tuple[str, ...]:
    """Return the forms in which a text may contain a question.

    Example:
        >>> renderings("1 + 1?", ["2", "3"], ["2"])
        ('1 + 1?', '1 + 1? 2', '1 + 1? 2 3', '1 + 1? A. 2 B. 3')
    """
    lettered = (f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))
    listed = [f"{question} {' '.join(options)}", f"{question} {' '.join(lettered)}"] if options else []
    return (question, *(f"{question} {answer}" for answer in answers), *listed)
