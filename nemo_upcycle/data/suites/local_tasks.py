"""The tasks that need no network: their definitions for lm-eval, and their files in a suite's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.writers import yaml_text


#: Local task -> its definition for lm-eval, without its name and the path of its data. The prompts are from lm-eval's
#: `mmlu` (letters) and from its cloze variant (answers).
LOCAL_TASKS: dict[str, dict[str, Any]] = {
    "mmlu_letter": {
        "output_type": "multiple_choice",
        "description": "The following are multiple choice questions (with answers) about"
        " {{subject.replace('_', ' ')}}.\n\n",
        "doc_to_text": "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "mmlu_answer": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question.strip()}}\nAnswer:",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    },
    "heldout_perplexity": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    # Prompts are rendered with the parent's chat template. lm-eval does not compute the loss of an answer, so
    # `evaluate` adds this loss.
    "heldout_answers": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}

#: Task -> template of the answer in a worked example of the same subject.
_SHOWN_ANSWERS = {"mmlu_letter": "{{'ABCD'[answer]}}", "mmlu_answer": "{{choices[answer]}}"}


def is_text(task: str) -> bool:
    """Return whether a task predicts whole texts instead of asking questions."""
    return LOCAL_TASKS[task]["output_type"] == "loglikelihood_rolling"


def is_answers(task: str) -> bool:
    """Return whether a task scores held-out answers of conversations."""
    return LOCAL_TASKS[task]["output_type"] == "loglikelihood"


def task_name(task: str, shots: int) -> str:
    """Return the name of a task with worked examples before the question.

    Example:
        >>> task_name("mmlu_letter", 5)
        'mmlu_letter_5shot'
    """
    return f"{task}_{shots}shot" if shots else task


def write_task(folder: Path, final: Path, task: str, shots: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a task, `NAME.yaml` and `NAME.jsonl`, into a suite's folder.

    Args:
        folder: folder to write into, which is renamed to `final` later.
        final: final path of the suite.
        task: key of `LOCAL_TASKS`.
        shots: number of worked examples before the question; the `examples` of each row are its worked examples.
        rows: items of the task.

    Raises:
        UpcycleError: there are no items.
    """
    name = task_name(task, shots)
    if not rows:
        raise UpcycleError(
            f"Task {name} of the suite",
            kind="state",
            got="has no item",
            fix="give more data, or raise the limits of the configuration",
        )
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    definition = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": data_files(final, name),
        "test_split": "test",
        **LOCAL_TASKS[task],
        "metadata": {"version": 1.0},
    }
    if shots:
        definition["doc_to_text"] = _with_examples(definition["doc_to_text"], _SHOWN_ANSWERS[task])
    (folder / f"{name}.yaml").write_text(yaml_text(definition, width=1000), encoding="utf-8")


def _with_examples(prompt: str, answer: str) -> str:
    """Put worked examples before a prompt template, because lm-eval would mix examples of all subjects."""
    names = "question, choices, answer"
    values = ", ".join(f"example.{name}" for name in names.split(", "))
    return f"{{% for example in examples %}}{{% set {names} = {values} %}}{prompt} {answer}\n\n{{% endfor %}}{prompt}"


def data_files(suite: Path, name: str) -> dict[str, Any]:
    """Return lm-eval's `dataset_kwargs` for a task of a suite: the absolute path of its data."""
    return {"data_files": {"test": str(suite.absolute() / f"{name}.jsonl")}}
