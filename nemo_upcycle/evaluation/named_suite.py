"""Build a suite of `conf/evaluation` from the documents that a blend holds out and the questions that it names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nemo_upcycle.data.assets import fetch_asset
from nemo_upcycle.data.questions import mmlu_questions
from nemo_upcycle.evaluation.suite import build_suite
from nemo_upcycle.evaluation.suite_config import read_suite_config


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
    asks_mmlu = config.local and any(task.startswith("mmlu") for task in config.tasks)
    questions = mmlu_questions(fetch_asset("mmlu")) if asks_mmlu else []
    return build_suite(questions, heldout_documents, output, config)
