"""Build a suite: a folder with lm-eval tasks and their data, from local questions and held-out documents.

Every task is a YAML file of lm-eval's own kind beside a JSON lines file, so that
`lm_eval --include_path FOLDER --tasks mmlu_letter ...` runs the same suite without this package.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import read_conf
from nemo_upcycle.utils.files import MARKER, output_folder, sha256_file, write_json
from nemo_upcycle.utils.validation import is_whole


@dataclass
class QuestionsConfig:
    """Which multiple-choice questions to take; None is no limit."""

    per_subject: int | None = None
    total: int | None = None
    max_characters: int | None = None


@dataclass
class HeldoutConfig:
    """How held-out documents are cut, and how many windows are taken; None is all."""

    window_bytes: int = 4096
    windows: int | None = None


@dataclass
class SuiteConfig:
    """What to evaluate; `conf/evaluation/demo.yaml` explains every key."""

    tasks: dict[str, list[int]]
    local: bool = True
    seed: int = 1234
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    heldout: HeldoutConfig = field(default_factory=HeldoutConfig)
    batch_size: int | str = 8
    dtype: str = "float32"
    backend: str = "auto"


#: Types to evaluate in.
DTYPES = ("float32", "bfloat16", "float16")
#: What computes.
BACKENDS = ("auto", "hf", "vllm", "megatron")
#: The tasks that can be built locally: lm-eval's definition of each, without its name and the path of its data.
#: The prompts are those of lm-eval's `mmlu` (letters) and of its cloze variant (answers).
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
}


#: Number of held-out texts that every model continues, and bytes of each prompt: about 40 tokens.
PROMPTS, PROMPT_BYTES = 2, 160


def read_suite_config(name: str | Path) -> SuiteConfig:
    """Read a suite configuration.

    Args:
        name: one of the package's own (`demo`, `full`, `paper`), or the path of a YAML file.

    Raises:
        UpcycleError: there is no such configuration, or it has an unknown key, task or a value of the wrong type.

    Example:
        >>> read_suite_config("demo").heldout.window_bytes
        1024
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    content, path, _ = read_conf("evaluation", name, "evaluation suite")
    _check_keys(str(path), content, SuiteConfig)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(SuiteConfig), content)
        config = cast("SuiteConfig", OmegaConf.to_object(merged))
    except (OmegaConfBaseException, TypeError) as error:
        fix = "see the comments in conf/evaluation/demo.yaml"
        got = " ".join(str(error).split())  # OmegaConf writes three lines
        raise UpcycleError(str(path), got=got, expected="a suite configuration", fix=fix) from None
    if config.dtype not in DTYPES:
        raise UpcycleError.unknown(f"{path}: dtype", config.dtype, DTYPES)
    if config.backend not in BACKENDS:
        raise UpcycleError.unknown(f"{path}: backend", config.backend, BACKENDS)
    if config.batch_size != "auto" and not is_whole(config.batch_size, 1):
        raise UpcycleError(
            f"{path}: batch_size",
            got=config.batch_size,
            expected="a whole number from 1 on, or auto",
            fix="write auto to fill the GPU's memory",
        )
    for task, shots in config.tasks.items() if config.local else ():
        if task not in LOCAL_TASKS:
            raise UpcycleError.unknown(f"{path}: local task", task, LOCAL_TASKS)
        if shots != [0]:
            raise UpcycleError(
                f"{path}: tasks.{task}",
                got=shots,
                expected="[0]",
                fix="write [0]: local questions have no development split to take examples from",
            )
    return config


def _check_keys(where: str, values: Any, schema: type) -> None:
    """Refuse a key that `schema` lacks and name the closest one, which OmegaConf does not."""
    nested = {"questions": QuestionsConfig, "heldout": HeldoutConfig}
    names = [entry.name for entry in dataclasses.fields(schema)]
    for key, value in values.items() if isinstance(values, dict) else ():
        if key not in names:
            raise UpcycleError.unknown(f"{where}: key", str(key), names)
        if key in nested:
            _check_keys(f"{where}: {key}", value, nested[key])


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
            chosen = choose_questions(questions, config.questions, config.seed)
            windows = choose_windows(documents, config.heldout, config.seed)
            for task in config.tasks:
                rows = windows if LOCAL_TASKS[task]["doc_to_target"] == "text" else chosen
                _write_task(folder, output, task, rows)
                described["tasks"][task] = {"items": len(rows), "sha256": sha256_file(folder / f"{task}.jsonl")}
        write_json(folder / MARKER, described)
    return output


def _write_task(folder: Path, final: Path, task: str, rows: Sequence[Any]) -> None:
    """Write `TASK.yaml` and `TASK.jsonl` into `folder`, which will be renamed to `final`."""
    import yaml

    if not rows:
        raise UpcycleError(
            f"suite, task {task}",
            got="no item",
            expected="at least one",
            fix="give more data, or raise the limits of the configuration",
        )
    with (folder / f"{task}.jsonl").open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    definition = {
        "task": task,
        "dataset_path": "json",
        "dataset_kwargs": data_files(final, task),
        "test_split": "test",
        **LOCAL_TASKS[task],
        "metadata": {"version": 1.0},
    }
    (folder / f"{task}.yaml").write_text(yaml.safe_dump(definition, sort_keys=False, width=1000), encoding="utf-8")


def data_files(suite: Path, task: str) -> dict[str, Any]:
    """Return lm-eval's `dataset_kwargs` for a task of a suite: its data, by absolute path."""
    return {"data_files": {"test": str(suite.absolute() / f"{task}.jsonl")}}


def choose_questions(questions: Iterable[dict[str, Any]], config: QuestionsConfig, seed: int) -> list[dict[str, Any]]:
    """Return the questions a configuration asks for, by subject; the order of the input does not matter.

    A question with an empty answer is skipped: its length cannot normalise a log-likelihood.
    """
    by_subject: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for question in questions:
        texts = [question["question"], *question["choices"]]
        fits = config.max_characters is None or sum(map(len, texts)) <= config.max_characters
        if fits and all(text.strip() for text in texts):
            by_subject[question["subject"]].append((_rank(seed, *texts), question))
    ranked = [entry for group in by_subject.values() for entry in _first(group, config.per_subject)]
    taken = [question for _, question in _first(ranked, config.total)]
    return sorted(taken, key=lambda question: question["subject"])


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
    ranked = [(_rank(seed, entry["text"]), entry) for entry in windows]
    taken = [entry for _, entry in _first(ranked, config.windows)]
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


def _first(ranked: list[tuple[str, Any]], count: int | None) -> list[tuple[str, Any]]:
    return sorted(ranked, key=lambda entry: entry[0])[:count]


def _rank(seed: int, *texts: str) -> str:
    """Return a hash that orders items randomly, but identically on every machine."""
    return hashlib.sha256("\0".join([str(seed), *texts]).encode()).hexdigest()
