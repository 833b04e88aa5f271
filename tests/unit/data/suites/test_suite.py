from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemo_upcycle.data.suites.lm_eval_tasks import check_task_names
from nemo_upcycle.data.suites.local_tasks import task_name
from nemo_upcycle.data.suites.suite import build_suite, choose_questions, choose_windows, cut_windows
from nemo_upcycle.data.suites.suite_config import HeldoutConfig, QuestionsConfig, SuiteConfig, read_suite_config
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MARKER
from tests.unit.evaluation.conftest import DOCUMENTS, QUESTIONS


MANY = [
    {"question": f"Question {n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4, "subject": f"s{n % 5}"}
    for n in range(40)
]


@pytest.mark.parametrize(
    "name", ["answers", "demo", "full", "instructions", "laptop", "offline", "paper", "watch", "wide"]
)
def test_every_configuration_of_the_package_loads(name: str) -> None:
    config = read_suite_config(name)
    assert config.tasks
    assert config.local == (name not in ("instructions", "paper", "wide"))
    if name in ("paper", "full", "demo"):
        assert (config.backend, config.dtype) == ("auto", "bfloat16" if name == "paper" else "float32")
        assert config.batch_size == (8 if name == "demo" else "auto")


@pytest.mark.full
@pytest.mark.parametrize("name", ["instructions", "paper", "wide"])
def test_lm_eval_knows_every_task_of_the_hub_suites(name: str) -> None:
    from lm_eval.tasks import TaskManager

    check_task_names(list(read_suite_config(name).tasks), TaskManager().all_tasks)


def test_every_published_value_is_of_a_column_of_its_suite() -> None:
    config = read_suite_config("paper")
    assert config.published is not None
    columns = {task_name(task, shots) for task, numbers in config.tasks.items() for shots in numbers}
    assert {column.partition("/")[0] for column in config.published.columns} == columns
    averages = [statistics.fmean(values) for values in zip(*config.published.columns.values(), strict=True)]
    assert averages == pytest.approx([62.71, 63.89], abs=0.0051)  # the last column of the paper's table


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: {mmlu_leter: [0]}", ": local task 'mmlu_leter' does not exist"),
        ("tasks: {mmlu_letter: [5]}", ": tasks.mmlu_letter is [5]; expected numbers of examples from 0 to "),
        (
            "tasks: {heldout_perplexity: [5]}\nquestions: {examples: 5}",
            ": tasks.heldout_perplexity is [5]; expected numbers of examples from 0 to 0",
        ),
        ("tasks: {mmlu: [0]}\nlocal: false\npublished: {source: x}", ": published.models is missing; expected a list"),
        ("tasks: {mmlu_letter: [0]}\ninclude_path: .", ": include_path needs local: false"),
        (
            "tasks: {piqa: [0]}\nlocal: false\ninclude_path: /nowhere",
            ": include_path names /nowhere, which is not a folder",
        ),
        ("tasks: {mmlu_letter: [0]}\nbackend: vlm", ": backend 'vlm' does not exist. Did you mean 'vllm'?"),
        ("tasks: {mmlu_letter: [0]}\nbatch_size: automatic", ": batch_size is automatic; expected "),
        ("tasks: {mmlu_letter: [0]}\nchat_template: true", ": chat_template cannot be combined with local: true"),
        ("tasks: {mmlu_letter: [0]}\nfiles: {mmlu_letter: a.jsonl}", ": files cannot be combined with local: true"),
    ],
)
def test_a_wrong_configuration_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UpcycleError) as caught:
        read_suite_config(path)
    assert f"mine.yaml{said}" in str(caught.value)


def test_the_choice_depends_only_on_the_seed() -> None:
    config = QuestionsConfig(per_subject=2, total=7)
    shuffled = random.Random(1).sample(MANY, len(MANY))
    chosen = choose_questions(MANY, config, seed=0)
    assert choose_questions(shuffled, config, seed=0) == chosen
    assert choose_questions(MANY, config, seed=1) != chosen
    assert len(chosen) == 7
    subjects = [question["subject"] for question in chosen]
    assert subjects == sorted(subjects)
    assert max(map(subjects.count, subjects)) <= 2


@pytest.mark.parametrize(
    ("config", "chosen"),
    [
        (QuestionsConfig(), range(40)),
        (QuestionsConfig(max_characters=len("Question 9?") + 4), range(10)),
        (QuestionsConfig(examples=8), ()),  # each subject has only 8 questions
    ],
)
def test_limits_leave_out_questions(config: QuestionsConfig, chosen: Sequence[int]) -> None:
    empty = {**MANY[0], "question": "Question 1?", "choices": ["a", "", "c", "d"]}
    found = [question["question"] for question in choose_questions([empty, *MANY], config, seed=0)]
    assert sorted(found) == sorted(f"Question {number}?" for number in chosen)


def test_examples_are_of_the_same_subject_and_never_asked(tmp_path: Path) -> None:
    config = SuiteConfig({"mmlu_letter": [0, 2], "mmlu_answer": [2]}, questions=QuestionsConfig(examples=3))
    suite = build_suite(MANY, [], tmp_path / "suite", config)
    tasks = json.loads((suite / MARKER).read_text())["tasks"]
    names = ("mmlu_letter", "mmlu_letter_2shot", "mmlu_answer_2shot")
    assert {name: entry["items"] for name, entry in tasks.items()} == dict.fromkeys(names, 25)
    rows = [json.loads(line) for line in (suite / "mmlu_letter_2shot.jsonl").read_text().splitlines()]
    asked = {row["question"] for row in rows}
    for row in rows:
        assert len(row["examples"]) == 2
        for example in row["examples"]:
            assert example["subject"] == row["subject"]
            assert example["question"] not in asked


def test_keeping_examples_changes_no_choice_of_questions() -> None:
    few = QuestionsConfig(per_subject=2)
    with_examples = dataclasses.replace(few, examples=5)
    assert choose_questions(MANY, few, seed=0) == choose_questions(MANY, with_examples, seed=0)


def test_windows_hold_the_whole_document_within_their_size() -> None:
    text = "  one  two\nthree éé " + "x" * 30 + " end "
    windows = cut_windows(text, 12)
    assert windows == ["one  two", "three éé", "x" * 30, "end"]


def test_windows_are_chosen_by_seed_and_come_in_order() -> None:
    everything = choose_windows(DOCUMENTS, HeldoutConfig(window_bytes=20), seed=0)
    some = choose_windows(DOCUMENTS, HeldoutConfig(window_bytes=20, windows=4), seed=0)
    assert len(some) == 4
    assert [window for window in everything if window in some] == some
    assert some != choose_windows(DOCUMENTS, HeldoutConfig(window_bytes=20, windows=4), seed=3)


def test_prompts_are_held_out_text_with_what_follows(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(400)]
    documents = [("long", " ".join(words)), ("short", "two words")]
    for config in (SuiteConfig(tasks={"heldout_perplexity": [0]}), read_suite_config("paper")):
        suite = build_suite([], iter(documents), tmp_path / "suite", config)
        prompts = json.loads((suite / MARKER).read_text())["prompts"]
        assert len(prompts) == 2
        for prompt in prompts:
            whole = dict(documents)[prompt["document"]]
            assert f"{prompt['prompt']} {prompt['goes_on']}".strip() in whole
            assert len(prompt["prompt"].encode()) <= 160
    assert any(prompt["goes_on"] for prompt in prompts)


def test_a_task_without_items_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match="Task heldout_perplexity of the suite has no item"):
        build_suite(QUESTIONS, [], tmp_path / "suite", SuiteConfig(tasks={"heldout_perplexity": [0]}))
    assert list(tmp_path.iterdir()) == []
