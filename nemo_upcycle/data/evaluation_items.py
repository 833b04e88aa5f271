"""Collect the items of evaluation suites and index their n-grams, to keep them out of training data."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.data.assets import fetch_asset
from nemo_upcycle.data.lm_eval_tasks import load_tasks, question_of
from nemo_upcycle.data.ngrams import BOILERPLATE, SHORTEST, WORDS, Item, NgramIndex
from nemo_upcycle.data.questions import mmlu_questions
from nemo_upcycle.evaluation.choose import choose_questions
from nemo_upcycle.evaluation.suite_config import read_suite_config


#: Words of an n-gram of the report, which is looser.
REPORT_WORDS = 8


def build_index(suites: Sequence[str | Path], path: Path, report: Path | None = None) -> dict[str, Any]:
    """Write the index of the n-grams of all items of some suites.

    Args:
        suites: names of `conf/evaluation` or paths of YAML files. Those of lm-eval's own tasks need the Hugging Face
            hub, or its cache.
        path: the file to write, of n-grams of 13 words: what it finds is removed.
        report: the file of n-grams of 8 words, or None: what it finds is reported.

    Returns:
        `suites`; `words`, `shortest` and `boilerplate`: how items are looked for; `ngrams`: how many; `sets`: for each
        evaluation set, what `NgramIndex.summary` says; and the same of the other file as `report`.

    Raises:
        UpcycleError: an unknown suite or task, or data that cannot be fetched.

    Example:
        >>> build_index(["demo"], Path("ngrams.npz"))["sets"]["mmlu"]["items"]  # doctest: +SKIP
        24
    """
    items = {(item.name, item.id): item for suite in suites for item in suite_items(suite)}
    written = {"suites": [str(suite) for suite in suites], **_write_index(items.values(), path, WORDS)}
    return written | ({"report": _write_index(items.values(), report, REPORT_WORDS)} if report else {})


def _write_index(items: Iterable[Item], path: Path, words: int) -> dict[str, Any]:
    index = NgramIndex.build(items, words)
    index.save(path)
    settings = {"words": words, "shortest": SHORTEST, "boilerplate": BOILERPLATE}
    return {**settings, "ngrams": len(index.arrays["hashes"]), "sets": index.summary}


def suite_items(suite: str | Path) -> Iterator[Item]:
    """Yield the items that a suite asks, in a fixed order.

    The held-out documents of a suite are no items: they come from the blend itself, which keeps them out of training.

    Args:
        suite: as in `build_index`.

    Raises:
        UpcycleError: as in `build_index`.
    """
    config = read_suite_config(suite)
    if not config.local:
        yield from lm_eval_items(list(config.tasks))
    elif any(task.startswith("mmlu") for task in config.tasks):
        numbered = [{**row, "number": number} for number, row in enumerate(mmlu_questions(fetch_asset("mmlu")))]
        for row in choose_questions(numbered, config.questions, config.seed):
            forms = renderings(row["question"], row["choices"], [row["choices"][row["answer"]]])
            yield Item("mmlu", f"{row['subject']}/{row['number']}", forms)


def lm_eval_items(names: Sequence[str], include_path: Path | None = None) -> Iterator[Item]:
    """Yield the documents that tasks of lm-eval evaluate: those of the test split, else of the validation split.

    Args:
        names: tasks or groups; each is an evaluation set, `lm-eval/NAME`.
        include_path: a folder with task files of the user's own, or None.

    Raises:
        UpcycleError: an unknown task, or data that cannot be fetched.
    """
    for name, tasks in load_tasks(names, include_path).items():
        for task in tasks:
            for number, document in enumerate(task.eval_docs):
                yield Item(f"lm-eval/{name}", f"{task.task_name}/{number}", _forms(task, document))


def _forms(task: Any, document: Mapping[str, Any]) -> tuple[str, ...]:
    found = question_of(task, document)
    stems = [found.stem]
    if isinstance(document.get("question"), str):  # where the prompt puts a passage or examples before it
        stems.append(document["question"])
    prompts = (f"{found.prompt} {answer}" for answer in found.answers or ("",))
    return (*(form for stem in stems for form in renderings(stem, found.options, found.answers)), *prompts)


def renderings(question: str, options: Sequence[str], answers: Sequence[str]) -> tuple[str, ...]:
    """Return the forms in which a text may contain a question.

    Example:
        >>> renderings("1 + 1?", ["2", "3"], ["2"])
        ('1 + 1?', '1 + 1? 2', '1 + 1? 2 3', '1 + 1? A. 2 B. 3')
    """
    lettered = (f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))
    listed = [f"{question} {' '.join(options)}", f"{question} {' '.join(lettered)}"] if options else []
    return (question, *(f"{question} {answer}" for answer in answers), *listed)
