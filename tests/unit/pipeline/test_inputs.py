"""The inputs of a run are read once; texts and conversations are told apart, and each kind needs its own suites."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.checks import check_asked, check_data
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.launch import absolute_argument
from nemo_upcycle.pipeline.needs import run_needs
from tests.chats import sums, write_lines


@pytest.mark.parametrize(("data", "suite"), [("chatterbot", "demo"), ("sotu", "answers")])
def test_refuses_suites_about_data_not_held_out(data: str, suite: str) -> None:
    check_asked(Inputs("dense", data, {"demo": "answers", "answers": "demo"}[suite]))
    with pytest.raises(UpcycleError, match=f"Suite {suite} has the task heldout_"):
        check_asked(Inputs("dense", data, suite))


def test_files_of_conversations_are_looked_for_before_anything_starts(tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "mine.jsonl", sums(3))
    check_data(Inputs("dense", str(lines), "answers"), remote=False)
    with pytest.raises(UpcycleError, match=r"is not a file"):
        check_data(Inputs("dense", str(tmp_path / "other.jsonl"), "answers"), remote=False)


def test_a_plan_reads_conversations_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_argument("mine.jsonl", folder=True) == str(tmp_path / "mine.jsonl")
    assert absolute_argument("texts.parquet", folder=True) == str(tmp_path / "texts.parquet")
    (tmp_path / "mine.jsonl").touch()
    chat, texts = Inputs("dense", "mine.jsonl", "answers"), Inputs("dense", "sotu", "demo")
    assert (chat.blend, texts.chat) == (None, None)
    (tmp_path / "chat.yaml").write_text("files: [a.jsonl]")
    (tmp_path / "texts.yaml").write_text("sources: {a: {train: [a.txt]}}")
    assert [Inputs("dense", f"{tmp_path}/{name}.yaml", "").reads_chat for name in ("chat", "texts")] == [True, False]


def test_the_demos_conversations_are_fetched_beforehand() -> None:
    needs = {need.what: need for need in run_needs(Inputs("", "chatterbot", "answers"))}
    assert needs["conversations chatterbot"].inputs == ("data",)
    assert "questions mmlu" in needs


def test_inputs_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "suite.yaml").write_text("{tasks: {piqa: [0]}, local: false}")
    suite, train = tmp_path / "suite.yaml", "[hf://datasets/a/b.txt]"
    (tmp_path / "texts.yaml").write_text(f"{{sources: {{a: {{train: {train}}}}}, decontaminate: ['{suite}']}}")
    inputs = Inputs("", str(tmp_path / "texts.yaml"), str(suite))
    needs = [need.what for need in run_needs(inputs)]
    assert needs == ["source a (hf://datasets/a/b.txt)", "lm-eval's piqa"]
    for path in tmp_path.iterdir():
        path.unlink()
    assert [need.what for need in run_needs(inputs)] == needs


def test_texts_by_address_are_fetched() -> None:
    (need,) = run_needs(Inputs("", "hf://datasets/a/b.jsonl", ""))
    assert need.what == "source texts (hf://datasets/a/b.jsonl)"
