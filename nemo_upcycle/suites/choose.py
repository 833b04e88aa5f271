"""Choose the items of a suite: the same seed always takes the same ones, whatever their order."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

from nemo_upcycle.suites.suite_config import HeldoutConfig, QuestionsConfig, SuiteConfig


#: Number of held-out texts that every model continues, and bytes of each prompt: about 40 tokens.
PROMPTS, PROMPT_BYTES = 2, 160


def local_questions(config: SuiteConfig) -> list[dict[str, Any]]:
    """Return MMLU's questions, fetched on first use, for a suite whose local tasks ask them; none for another one."""
    if not config.local or not any(task.startswith("mmlu") for task in config.tasks):
        return []
    from nemo_upcycle.demo.assets import fetch_asset
    from nemo_upcycle.demo.questions import mmlu_questions

    return mmlu_questions(fetch_asset("mmlu"))


def choose_questions(questions: Iterable[dict[str, Any]], config: QuestionsConfig, seed: int) -> list[dict[str, Any]]:
    """Return the questions a configuration asks for, by subject; the order of the input does not matter.

    A question with an empty answer is skipped: its length cannot normalise a log-likelihood. So are those that are
    kept as examples.
    """
    groups = _by_subject(questions, config, seed).values()
    asked = (group[: len(group) - config.examples][: config.per_subject] for group in groups)
    ranked = sorted((entry for group in asked for entry in group), key=itemgetter(0))
    taken = [question for _, question in ranked[: config.total]]
    return sorted(taken, key=lambda question: question["subject"])


def choose_examples(
    questions: Iterable[dict[str, Any]], config: QuestionsConfig, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the questions of each subject that are shown with their answers, and never asked."""
    groups = _by_subject(questions, config, seed)
    return {
        subject: [question for _, question in group[len(group) - config.examples :]]
        for subject, group in groups.items()
    }


def _by_subject(
    questions: Iterable[dict[str, Any]], config: QuestionsConfig, seed: int
) -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Return the questions that can be taken, by subject, each with its rank and in the order of it."""
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
    """Return the windows a configuration asks for, by document and position.

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


def choose_prompts(documents: Iterable[tuple[str, str]], seed: int) -> list[dict[str, Any]]:
    """Return held-out texts to continue: `document` (its id), `prompt`, and how the text itself `goes_on`."""
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
