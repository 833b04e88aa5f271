"""Build a suite: a folder with lm-eval tasks and their data, from local questions and held-out documents.

Every task is a YAML file of lm-eval's own kind beside a JSON lines file, so that
`lm_eval --include_path FOLDER --tasks mmlu_letter ...` runs the same suite without this package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nemo_upcycle.suites.choose import (
    choose_examples,
    choose_prompts,
    choose_questions,
    choose_windows,
    local_questions,
)
from nemo_upcycle.suites.local_tasks import is_text, task_name, write_task
from nemo_upcycle.suites.suite_config import SuiteConfig, read_suite_config
from nemo_upcycle.utils.files import MARKER, output_folder, sha256_file, write_json


def build_named_suite(name: str | Path, heldout_documents: Iterable[tuple[str, str]], output: Path) -> Path:
    """Write the folder of a suite.

    Args:
        name: of `conf/evaluation`, or a YAML file.
        heldout_documents: id and text of whole documents that training did not see.
        output: the folder to write; an earlier one is replaced.

    Returns:
        `output`.

    Raises:
        UpcycleError: the configuration is wrong, a local task has no item, or the questions cannot be fetched.
    """
    config = read_suite_config(name)
    return build_suite(local_questions(config), heldout_documents, output, config)


def build_suite(
    questions: Iterable[dict[str, Any]],
    heldout_documents: Iterable[tuple[str, str]],
    output: Path,
    config: SuiteConfig,
) -> Path:
    """Write the folder of a suite, which `evaluate` reads.

    Args:
        questions: dicts with `question`, `choices` (four texts), `answer` (0 to 3) and `subject`.
        heldout_documents: id and text of whole documents that training did not see.
        output: the folder to write; an earlier one is replaced.
        config: what to take. With `local: false` the folder only names lm-eval's own tasks; of the documents only the
            prompts are used, and the questions not at all.

    Returns:
        `output`.

    Raises:
        UpcycleError: a local task has no item.
    """
    documents = list(heldout_documents)
    prompts = choose_prompts(documents, config.seed)
    described: dict[str, Any] = {"config": dataclasses.asdict(config), "tasks": {}, "prompts": prompts}
    with output_folder(output) as folder:
        if config.local:
            asked = list(questions)
            chosen = choose_questions(asked, config.questions, config.seed)
            examples = choose_examples(asked, config.questions, config.seed)
            windows = choose_windows(documents, config.heldout, config.seed)
            for task, shots in ((task, shots) for task, numbers in config.tasks.items() for shots in numbers):
                rows = windows if is_text(task) else chosen
                if shots:
                    rows = [{**row, "examples": examples[row["subject"]][:shots]} for row in rows]
                write_task(folder, output, task, shots, rows)
                name = task_name(task, shots)
                described["tasks"][name] = {"items": len(rows), "sha256": sha256_file(folder / f"{name}.jsonl")}
        write_json(folder / MARKER, described)
    return output
