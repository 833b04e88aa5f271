from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_upcycle.data.ngrams import NgramIndex
from nemo_upcycle.data.readers.lm_eval import write_training_splits
from nemo_upcycle.data.suites.items import lm_eval_items
from nemo_upcycle.data.suites.lm_eval_tasks import check_task_names, load_tasks, question_of
from nemo_upcycle.errors import UpcycleError
from tests.lm_eval_tasks import write_task


_CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
_LETTERS = "\nA. {{choices[0]}}\nB. {{choices[1]}}\nAnswer:"
#: The formats of lm-eval's own tasks: letters, answers about a passage, a choice of beginnings, free text.
FORMATS: dict[str, dict[str, Any]] = {
    "lettered": _CHOICE | {"doc_to_text": "{{question.strip()}}" + _LETTERS, "doc_to_choice": ["A", "B"]},
    "passage": {
        **_CHOICE,
        "doc_to_text": "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:",
        "should_decontaminate": True,
        "doc_to_decontamination_query": "{{support}} {{question}}",
    },
    "listed": _CHOICE | {"doc_to_text": "Passage: {{support}}\nQuestion: {{question}}\nChoices:" + _LETTERS},
    "beginnings": {
        **_CHOICE,
        "doc_to_text": "{{answer}}",
        "doc_to_choice": "{{[question ~ ' ' ~ choices[0], question ~ ' ' ~ choices[1]]}}",
        "doc_to_target": "{{support}}",
    },
    "free": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{choices[answer]}}",
        "target_delimiter": "\n",
    },
    "several": {"output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "choices"},
}


def row(split: str, number: int, **changed: Any) -> dict[str, Any]:
    return {
        "question": f" Which {split} question number {number} is asked?",
        "support": f"The passage of {split} {number}.",
        "choices": [f"the {split} one", f"the {split} other"],
        "answer": number % 2,
        **changed,
    }


def write_own(folder: Path, name: str, layout: str, rows: dict[str, list[dict[str, Any]]], **changed: Any) -> None:
    metric = "exact_match" if "generate" in FORMATS[layout]["output_type"] else "acc"
    write_task(folder, name, rows, **FORMATS[layout], metric_list=[{"metric": metric}], **changed)


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for layout in FORMATS:
        rows = {"train": [row("train", n) for n in range(3)], "test": [row("test", n) for n in range(2)]}
        write_own(folder, f"own_{layout}", layout, rows)
    write_own(folder, "own_test_only", "free", {"test": [row("test", 0)]})
    write_own(folder, "own_dev", "free", {"dev": [row("dev", 0)], "test": [row("test", 0)]}, training_split="dev")
    write_own(folder, "own_same", "free", {"rows": [row("rows", 0)]}, training_split="rows", test_split="rows")
    unanswered = [row("train", 0), row("train", 1, answer=-1), row("train", 2)]
    write_own(folder, "own_unanswered", "lettered", {"train": unanswered, "test": unanswered})
    group = {"group": "own_group", "task": ["own_passage", "own_lettered"]}
    (folder / "own_group.yaml").write_text(yaml.safe_dump(group), encoding="utf-8")
    return folder


STEM = "Which test question number 1 is asked?"
PASSAGE = "The passage of test 1.\n"
OPTIONS = ("the test one", "the test other")


@pytest.mark.parametrize(
    ("layout", "stem", "options", "answers"),
    [
        ("lettered", f"{STEM}\n", OPTIONS, OPTIONS[1:]),
        ("passage", f"{PASSAGE} {STEM}", OPTIONS, OPTIONS[1:]),
        ("listed", f"{PASSAGE} {STEM}\n", OPTIONS, OPTIONS[1:]),
        ("beginnings", f" {STEM} the test other", (), ("The passage of test 1.",)),
        ("free", STEM, (), OPTIONS[1:]),
        ("several", f" {STEM}", (), OPTIONS),
    ],
)
def test_documents_are_read_as_questions(
    tasks_folder: Path, layout: str, stem: str, options: tuple[str, ...], answers: tuple[str, ...]
) -> None:
    (task,) = load_tasks([f"own_{layout}"], tasks_folder)[f"own_{layout}"]
    document = task.eval_docs[1]
    found = question_of(task, document)
    assert (found.stem.split(), found.options, found.answers) == (stem.split(), options, answers)
    is_choice = layout == "beginnings"
    assert found.prompt == (task.doc_to_choice(document)[1] if is_choice else task.doc_to_text(document))


def test_items_are_the_evaluated_documents_in_all_forms(tasks_folder: Path) -> None:
    items = list(lm_eval_items(["own_passage", "own_lettered"], tasks_folder))
    ids = [f"{name}/{number}" for name in ("own_passage", "own_lettered") for number in (0, 1)]
    assert [(item.name, item.id) for item in items] == [(f"lm-eval/{one[:-2]}", one) for one in ids]
    index = NgramIndex.build(items)
    for text in (
        f"He wondered: {STEM} Nobody knew.",
        f"{STEM} the test other",
        f"{STEM}\nthe test one\nthe test other",
        f"{STEM}\n(A) the test one\n(B) the test other",
        f"The passage of test 1. {STEM}",
        f"The passage of test 1.\nQuestion: {STEM}\nAnswer: the test other",
    ):
        assert any(1 in hit.items for hit in index.find(text)), text
    assert index.find("Which train question number 1 is asked? the train other") == []


def test_group_is_one_evaluation_set(tasks_folder: Path) -> None:
    items = list(lm_eval_items(["own_group"], tasks_folder))
    assert {item.name for item in items} == {"lm-eval/own_group"}
    assert [item.id for item in items] == ["own_lettered/0", "own_lettered/1", "own_passage/0", "own_passage/1"]


def test_training_splits_are_written_as_lm_eval_shows_examples(tasks_folder: Path, tmp_path: Path) -> None:
    names = [f"own_{layout}" for layout in FORMATS]
    write_training_splits(names, tmp_path / "out", tasks_folder)
    for name, (task,) in load_tasks(names, tasks_folder).items():
        lines = [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]
        assert [line["id"] for line in lines] == [f"{name}/train/{number}" for number in range(3)]
        assert not any("test" in line["text"] for line in lines)
        expected = " Which train question number 0 is asked? the train one The passage of train 0."
        if name != "own_beginnings":  # lm-eval shows no examples of this format
            document = task.training_docs()[0]
            turn = task.build_qa_turn(
                q=task.doc_to_text(document),
                c=task.doc_to_choice(document) if task.config.doc_to_choice else None,
                a=task.doc_to_target(document),
                tgt_delim=task.config.target_delimiter,
                few_delim="",
            )
            expected = "".join(message.to_text() for message in turn)
        assert lines[0]["text"] == expected


def test_unanswered_documents_are_left_out(tasks_folder: Path, tmp_path: Path) -> None:
    write_training_splits(["own_unanswered"], tmp_path, tasks_folder)
    ids = [json.loads(line)["id"] for line in (tmp_path / "own_unanswered.jsonl").read_text().splitlines()]
    assert ids == ["own_unanswered/train/0", "own_unanswered/train/2"]
    (task,) = load_tasks(["own_unanswered"], tasks_folder)["own_unanswered"]
    assert question_of(task, task.eval_docs[1]).answers == ()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_test_only", "has no training split"),
        ("own_dev", "would train on its split dev, which evaluations use"),
        ("own_same", "would train on its split rows, on which it is also evaluated"),
    ],
)
def test_what_is_evaluated_is_never_written(tasks_folder: Path, tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(UpcycleError, match=rf"Task {name} of lm-eval {said}\. Remove"):
        write_training_splits(["own_free", name], tmp_path / "out", tasks_folder)
    assert not (tmp_path / "out").exists()


def test_a_task_that_lm_eval_lacks_gets_the_closest_names() -> None:
    with pytest.raises(UpcycleError) as caught:
        check_task_names(["mmlu", "piqq"], ["mmlu", "piqa", "boolq"])
    assert str(caught.value).startswith("Task piqq does not exist in lm-eval (did you mean piqa?). ")
