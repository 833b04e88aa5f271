"""The training splits of lm-eval's tasks, written as texts in lm-eval's own words."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.data.needs import Need, task_need
from nemo_upcycle.data.readers import InputFile, Place, Reader, input_file, register
from nemo_upcycle.data.suites.lm_eval_tasks import load_tasks
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import whole_file


_EVALUATION_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")


@register
class LmEval(Reader):
    """Reader of lm-eval's training splits; entries are tasks or groups, `include_path` is a folder of user tasks."""

    name, options, renders = "lm_eval", ("include_path",), True

    def list_files(self, entries: list[str], options: dict[str, Any], at: Place) -> list[InputFile]:
        """See `Reader.list_files`."""
        paths = [at.work / f"{task}.jsonl" for task in entries]
        if not all(path.is_file() for path in paths):
            own = options.get("include_path")
            write_training_splits(entries, at.work, at.folder.absolute() / Path(own).expanduser() if own else None)
        return [input_file(path, "jsonl") for path in paths]

    def paths(self, entries: list[str], options: Mapping[str, Any]) -> list[str]:
        """Return only the files of the user's own tasks; see `Reader.paths`."""
        return [f"{own}/*"] if (own := options.get("include_path")) else []

    def needs(self, entries: list[str], options: Mapping[str, Any]) -> list[Need]:
        """See `Reader.needs`; the needs of the user's own tasks are unknown."""
        return [] if options.get("include_path") else [task_need(name) for name in entries]


def write_training_splits(names: Sequence[str], folder: Path, include_path: Path | None = None) -> None:
    """Write the training documents of lm-eval's tasks to `folder/NAME.jsonl`, in the order of their data sets.

    A line is `{"id": "TASK/train/NUMBER", "text": "..."}`. The text is lm-eval's worked example: the task's prompt,
    its delimiter and the right answer. Documents without an answer are omitted. Other splits are never used.

    Args:
        names: tasks or groups of lm-eval.
        folder: folder to write to, created if missing; files of an earlier call are replaced.
        include_path: a folder with task files of the user's own, or None.

    Raises:
        UpcycleError: a task is unknown, a task has no training split, a training split is also used for evaluation, or
            the data of a task cannot be fetched. In all these cases, nothing is written.

    Example:
        >>> write_training_splits(["sciq"], Path("runs/data"))  # doctest: +SKIP
    """
    loaded = load_tasks(names, include_path)
    for tasks in loaded.values():
        for task in tasks:
            _require_training_split(task)
    folder.mkdir(parents=True, exist_ok=True)
    for name, tasks in loaded.items():
        _write(tasks, folder / f"{name}.jsonl")


def _require_training_split(task: Any) -> None:
    split = task.config.training_split
    if not task.has_training_docs():
        got = "has no training split"
    elif split and re.split(r"[\[+]", split)[0] in _EVALUATION_SPLITS:
        got = f"would train on its split {split}, which evaluations use"
    elif split and split in (task.config.validation_split, task.config.test_split):
        got = f"would train on its split {split}, on which it is also evaluated"
    else:
        return
    raise UpcycleError(
        f"Task {task.task_name} of lm-eval", kind="refused", got=got, fix="remove the task from the blend"
    )


def _write(tasks: list[Any], path: Path) -> None:
    with whole_file(path) as aside, aside.open("w", encoding="utf-8") as handle:
        for task in tasks:
            for number, document in enumerate(task.training_docs()):
                if (text := _worked_example(task, document)) is not None:
                    line = {"id": f"{task.task_name}/train/{number}", "text": text}
                    handle.write(json.dumps(line, ensure_ascii=False) + "\n")


def _worked_example(task: Any, document: Mapping[str, Any]) -> str | None:
    """Return prompt, delimiter and answer; None if the data have no answer."""
    prompt, answer = task.doc_to_text(document), task.doc_to_target(document)
    choices = task.doc_to_choice(document) if task.config.doc_to_choice else []
    if isinstance(answer, list):
        answer = answer[0] if answer else ""
    if isinstance(prompt, int):  # each choice is the start of a sentence, the target is its end
        prompt = choices[prompt]
    elif isinstance(answer, int) and choices:
        answer = choices[answer] if 0 <= answer < len(choices) else ""
    return f"{prompt}{task.config.target_delimiter}{answer}" if str(answer).strip() else None
