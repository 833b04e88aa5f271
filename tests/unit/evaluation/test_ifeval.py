"""lm-eval's ifeval task on prompts from a file: chat template, scores from its own code, and missing requirements."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_upcycle.data.suites import lm_eval_tasks
from nemo_upcycle.data.suites.items import lm_eval_items
from nemo_upcycle.data.suites.suite import build_named_suite, load_suite_tasks
from nemo_upcycle.data.suites.suite_config import read_suite_config
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.paired import paired_difference
from nemo_upcycle.evaluation.run import ask, evaluate
from tests.chats import TEMPLATE


SUITE = "tasks: {ifeval: [0]}\nlocal: false\nchat_template: true\nfiles: {ifeval: ifeval.jsonl}\n"


def prompt(key: int, text: str, asked: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a prompt with its instructions, in google/IFEval's format but in our own words."""
    return {"key": key, "prompt": text, "instruction_id_list": [*asked], "kwargs": [*asked.values()]}


_PLAIN = {"punctuation:no_comma": {}, "change_case:english_lowercase": {}}
_SKY = {"detectable_format:number_bullet_lists": {"num_bullets": 3}, "keywords:existence": {"keywords": ["sky"]}}
_SHORT = {"length_constraints:number_words": {"relation": "less than", "num_words": 5}}
PROMPTS = [
    prompt(1, "Say hello without a single comma, and write no capital letter.", _PLAIN),
    prompt(2, "Name a colour in three bullet points, and mention the word sky.", _SKY),
    prompt(3, "Write fewer than five words.", _SHORT),
]
#: Answer to each prompt. The first answer follows one of two instructions, the second answer follows both, and the
#: third answer follows no instruction.
WRITTEN = {1: "hello there, friend", 2: "* the sky\n* the sea\n* ink", 3: "Blue is the colour of it"}


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    return build_named_suite(_write(tmp_path, PROMPTS), [], tmp_path / "suite")


def test_instructions_are_checked_by_lm_evals_own_code(suite: Path, tmp_path: Path) -> None:
    prompts: list[str] = []
    result = ask(_writer(tmp_path, prompts), suite, samples=False)
    scores = [item["scores"] for item in result["items"]["ifeval"]]
    assert [score["inst_level_strict_acc"] for score in scores] == [[1, 2], [2, 2], [0, 1]]
    assert [bool(score["prompt_level_strict_acc"]) for score in scores] == [False, True, False]
    assert result["metrics"]["ifeval/prompt_level_strict_acc"]["value"] == pytest.approx(1 / 3)
    assert result["metrics"]["ifeval/inst_level_strict_acc"]["value"] == pytest.approx(3 / 5)
    assert result["metrics"]["ifeval/inst_level_strict_acc"]["stderr"] > 0
    assert prompts == [f"user: {row['prompt']}</s>\nassistant: " for row in PROMPTS]
    paired = paired_difference(result | {"name": "a"}, result | {"name": "b"}, "ifeval/inst_level_loose_acc")
    assert (paired["difference"], paired["items"], paired["higher_is_better"]) == (0, 3, True)


def test_a_model_writes_to_prompts_of_its_template(suite: Path, tmp_path: Path, tiny_llama: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    with pytest.raises(UpcycleError, match=r"tokenizer has no chat template"):
        evaluate(folder, suite, tmp_path / "results", name="base", limit=1)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tasks = load_suite_tasks(suite)
    # Generate 16 tokens instead of 1,280.
    tasks.loaded["ifeval"].tasks[0].set_config("generation_kwargs", {"max_gen_toks": 16}, update=True)
    result = evaluate(folder, suite, tmp_path / "results", name="tuned", limit=1, tasks=tasks)
    assert len(result["items"]["ifeval"]) == 1


def test_a_blend_can_be_kept_clear_of_the_prompts(suite: Path, tmp_path: Path) -> None:
    config = read_suite_config(tmp_path / "instructions.yaml")
    items = list(lm_eval_items(["ifeval"], files=config.files))
    assert len(items) == 3
    assert any(PROMPTS[2]["prompt"] in form for form in items[2].renderings)


def test_what_the_task_imports_is_missed_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lm_eval_tasks._IMPORTED, "ifeval", ("no_such_package",))
    with pytest.raises(UpcycleError, match=r'not installed: no_such_package\. Run: pip install "lm-eval\[ifeval\]"'):
        lm_eval_tasks.check_needs(["ifeval"], {})


def test_what_counts_sentences_is_asked_for_where_a_prompt_does(suite: Path, tmp_path: Path) -> None:
    if lm_eval_tasks._counts_sentences():
        pytest.skip("NLTK's punkt_tab is here")
    load_suite_tasks(suite)
    two = {"length_constraints:number_sentences": {"relation": "at least", "num_sentences": 2}}
    more = [*PROMPTS, prompt(4, "Write two sentences.", two)]
    asks = build_named_suite(_write(tmp_path / "more", more), [], tmp_path / "more/suite")
    with pytest.raises(UpcycleError, match=r"punkt_tab.*nltk\.downloader"):
        load_suite_tasks(asks)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (SUITE.replace("[0]", "[2]"), r"files\.ifeval needs tasks\.ifeval: \[0\], but the value is \[2\]"),
        (SUITE.replace("ifeval.jsonl", "nowhere.jsonl"), "nowhere.jsonl, which is not a file"),
    ],
)
def test_a_suite_whose_files_cannot_be_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = _write(tmp_path, PROMPTS)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UpcycleError, match=match):
        read_suite_config(path)


def _write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "instructions.yaml"
    path.write_text(SUITE, encoding="utf-8")
    return path


def _writer(folder: Path, prompts: list[str]) -> Any:
    """Return a model that answers each prompt with its text in `WRITTEN`, and records the prompts."""
    from lm_eval.models.huggingface import HFLM

    from nemo_upcycle.models.hf_model import load_tokenizer
    from tests.chats import write_chat_tokenizer

    class Writer(HFLM):
        def __init__(self) -> None:
            self.tokenizer, self.chat_template_args, self.enable_thinking = load_tokenizer(folder), {}, None
            self._rank, self._world_size, self.backend = 0, 1, "causal"

        def get_model_info(self) -> dict[str, Any]:
            return {}

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            prompts.extend(request.args[0] for request in requests)
            return [WRITTEN[request.doc["key"]] for request in requests]

    write_chat_tokenizer(folder)
    return SimpleNamespace(
        **{"lm": Writer(), "name": "hf", "device": "cpu", "batch_size": 1}, continue_prompts=lambda _: []
    )
