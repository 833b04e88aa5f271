"""Choose the items of a suite, and build it: a folder with lm-eval tasks and their data.

Every task is an lm-eval YAML file beside a JSON lines file, so that
`lm_eval --include_path FOLDER --tasks mmlu_letter ...` runs the same suite without this package. The same seed always
chooses the same items, whatever the order of the input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from nemo_upcycle.data.suites.lm_eval_tasks import LoadedTask, load_available_tasks
from nemo_upcycle.data.suites.local_tasks import is_answers, is_text, task_name, write_task
from nemo_upcycle.data.suites.suite_config import HeldoutConfig, QuestionsConfig, SuiteConfig, read_suite_config
from nemo_upcycle.utils.files import MARKER, output_folder, read_json, require_complete, sha256_file, write_json


#: Number of held-out texts that every model continues, and bytes of each prompt (about 40 tokens).
PROMPTS, PROMPT_BYTES = 2, 160


def build_named_suite(
    name: str | Path,
    heldout_documents: Iterable[tuple[str, str]],
    output: Path,
    answers: Iterable[dict[str, Any]] = (),
) -> Path:
    """Write the folder of a suite.

    Args:
        name: name in `conf/evaluation`, or path of a YAML file.
        heldout_documents: id and text of whole documents that training did not see.
        output: folder to write; an earlier folder is replaced.
        answers: answers of the held-out conversations, see `build_suite`.

    Returns:
        `output`.

    Raises:
        UpcycleError: the configuration is wrong, a local task has no item, or the questions cannot be fetched.
    """
    config = read_suite_config(name)
    return build_suite(local_questions(config), heldout_documents, output, config, answers)


def build_suite(
    questions: Iterable[dict[str, Any]],
    heldout_documents: Iterable[tuple[str, str]],
    output: Path,
    config: SuiteConfig,
    answers: Iterable[dict[str, Any]] = (),
) -> Path:
    """Write the folder of a suite, which `evaluate` reads.

    Args:
        questions: dicts with `question`, `choices` (four texts), `answer` (0 to 3) and `subject`.
        heldout_documents: id and text of whole documents that training did not see.
        output: folder to write; an earlier folder is replaced.
        config: configuration of the suite. With `local: false`, the folder only names lm-eval's own tasks. The
            documents then serve only for prompts, and the questions are not used.
        answers: answers of conversations that training did not see: `document`, `turn`, `prompt` and `answer`.

    Returns:
        `output`.

    Raises:
        UpcycleError: a local task has no item.
    """
    documents, replies = list(heldout_documents), choose_answers(answers, config.heldout, config.seed)
    prompts = choose_prompts(documents, config.seed) or [_as_prompt(row) for row in replies[:PROMPTS]]
    described: dict[str, Any] = {"config": dataclasses.asdict(config), "tasks": {}, "prompts": prompts}
    with output_folder(output) as folder:
        if config.local:
            asked = list(questions)
            chosen = choose_questions(asked, config.questions, config.seed)
            examples = choose_examples(asked, config.questions, config.seed)
            windows = choose_windows(documents, config.heldout, config.seed)
            for task, shots in ((task, shots) for task, numbers in config.tasks.items() for shots in numbers):
                rows = windows if is_text(task) else replies if is_answers(task) else chosen
                if shots:
                    rows = [{**row, "examples": examples[row["subject"]][:shots]} for row in rows]
                write_task(folder, output, task, shots, rows)
                name = task_name(task, shots)
                described["tasks"][name] = {"items": len(rows), "sha256": sha256_file(folder / f"{name}.jsonl")}
        write_json(folder / MARKER, described)
    return output


def asks_mmlu(config: SuiteConfig) -> bool:
    """Return whether a suite has local tasks that ask MMLU's questions."""
    return config.local and any(task.startswith("mmlu") for task in config.tasks)


@dataclass(frozen=True)
class SuiteTasks:
    """lm-eval's own tasks of a suite, with their data; empty for a local suite, whose data lie in its folder.

    Attributes:
        loaded: name -> loaded task.
        missing: name -> reason why its data cannot be loaded.
    """

    loaded: dict[str, LoadedTask]
    missing: dict[str, str]


def load_suite_tasks(suite: Path, *, strict: bool = False) -> SuiteTasks:
    """Load the tasks that a suite's folder names, before any model is loaded, so that missing data are noticed early.

    Args:
        suite: folder that `build_suite` wrote.
        strict: whether missing data of a task are an error, even if the suite is not strict.

    Raises:
        UpcycleError: the suite is incomplete, lm-eval does not know a task, or the data of no task can be loaded.
    """
    require_complete(suite, "suite", "build the suite")
    config = read_json(suite / MARKER)["config"]
    if config["local"]:
        return SuiteTasks({}, {})
    return SuiteTasks(
        *load_available_tasks(
            list(config["tasks"]), config["include_path"], files=config["files"], strict=strict or config["strict"]
        )
    )


def local_questions(config: SuiteConfig) -> list[dict[str, Any]]:
    """Return MMLU's questions, fetched on first use, if local tasks of the suite ask them; otherwise none."""
    if not asks_mmlu(config):
        return []
    from nemo_upcycle.sources.demo.asset_texts import mmlu_questions
    from nemo_upcycle.sources.demo.assets import fetch_asset

    return mmlu_questions(fetch_asset("mmlu"))


def choose_questions(questions: Iterable[dict[str, Any]], config: QuestionsConfig, seed: int) -> list[dict[str, Any]]:
    """Return the questions that a configuration asks for, by subject; the order of the input does not matter.

    A question with an empty answer is skipped, because its length cannot normalise a log-likelihood. Questions that
    are kept as examples are skipped, too.
    """
    groups = _by_subject(questions, config, seed).values()
    asked = (group[: len(group) - config.examples][: config.per_subject] for group in groups)
    ranked = sorted((entry for group in asked for entry in group), key=itemgetter(0))
    taken = [question for _, question in ranked[: config.total]]
    return sorted(taken, key=lambda question: question["subject"])


def choose_examples(
    questions: Iterable[dict[str, Any]], config: QuestionsConfig, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return, for each subject, the questions that serve as worked examples and are never asked."""
    groups = _by_subject(questions, config, seed)
    return {
        subject: [question for _, question in group[len(group) - config.examples :]]
        for subject, group in groups.items()
    }


def _by_subject(
    questions: Iterable[dict[str, Any]], config: QuestionsConfig, seed: int
) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return the usable questions by subject, each with its rank, in the order of their ranks."""
    by_subject: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for question in questions:
        texts = [question["question"], *question["choices"]]
        fits = config.max_characters is None or sum(map(len, texts)) <= config.max_characters
        if fits and all(text.strip() for text in texts):
            by_subject[question["subject"]].append((_rank(seed, *texts), question))
    return {
        subject: sorted(group, key=itemgetter(0))
        for subject, group in by_subject.items()
        if len(group) > config.examples
    }


def choose_windows(documents: Iterable[tuple[str, str]], config: HeldoutConfig, seed: int) -> list[dict[str, Any]]:
    """Return the windows that a configuration asks for, by document and position.

    Returns:
        Dicts with `document` (its id), `window` (its number in the document) and `text`.
    """
    windows: list[dict[str, Any]] = [
        {"document": document, "window": position, "text": text}
        for document, whole in documents
        for position, text in enumerate(cut_windows(whole, config.window_bytes))
    ]
    ranked = sorted(windows, key=lambda entry: _rank(seed, entry["text"]))
    taken = ranked[: config.windows]
    return sorted(taken, key=lambda entry: (entry["document"], entry["window"]))


def choose_answers(answers: Iterable[dict[str, Any]], config: HeldoutConfig, seed: int) -> list[dict[str, Any]]:
    """Return the held-out answers that a configuration asks for, each with its length, `answer_bytes`."""
    ranked = sorted(answers, key=lambda row: _rank(seed, row["prompt"], row["answer"]))
    taken = sorted(ranked[: config.answers], key=lambda row: (row["document"], row["turn"]))
    return [row | {"answer_bytes": len(row["answer"].encode())} for row in taken]


def _as_prompt(row: dict[str, Any]) -> dict[str, Any]:
    return {"document": row["document"], "prompt": row["prompt"], "goes_on": row["answer"]}


def choose_prompts(documents: Iterable[tuple[str, str]], seed: int) -> list[dict[str, Any]]:
    """Return held-out texts to continue: `document` (its id), `prompt`, and `goes_on` (the rest of the real text)."""
    windows = choose_windows(documents, HeldoutConfig(2 * PROMPT_BYTES, PROMPTS), seed)
    halves = [(window["document"], *cut_windows(window["text"], PROMPT_BYTES)[:2], "") for window in windows]
    return [{"document": document, "prompt": prompt, "goes_on": rest} for document, prompt, rest, *_ in halves]


def cut_windows(text: str, window_bytes: int) -> list[str]:
    """Cut a text at blanks into windows of at most `window_bytes` bytes of UTF-8; a longer word gets its own window.

    Example:
        >>> cut_windows("one two three", 8)
        ['one two', 'three']
    """
    windows: list[str] = []
    for word in re.findall(r"\s*\S+", text):
        if windows and len((windows[-1] + word).encode()) <= window_bytes:
            windows[-1] += word
        else:
            windows.append(word.lstrip())
    return windows


def _rank(seed: int, *texts: str) -> str:
    """Return a hash that orders items randomly, but identically on every machine."""
    return hashlib.sha256("\0".join([str(seed), *texts]).encode()).hexdigest()
