"""Real lm-eval runs on a tiny random Llama, compared with a plain loop over its logits."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from nemo_upcycle.cli.main import main
from nemo_upcycle.data.suites.suite import build_named_suite, build_suite, load_suite_tasks
from nemo_upcycle.data.suites.suite_config import HeldoutConfig, QuestionsConfig, SuiteConfig
from nemo_upcycle.errors import CheckpointError, UpcycleError
from nemo_upcycle.evaluation.backends import ModelOptions, load_model
from nemo_upcycle.evaluation.compare import compare_items
from nemo_upcycle.evaluation.heldout import ANSWER_BITS, BITS, by_source, document_sums
from nemo_upcycle.evaluation.paired import paired_difference
from nemo_upcycle.evaluation.run import _extract, evaluate
from nemo_upcycle.models.hf_model import load_tokenizer
from nemo_upcycle.utils.files import MARKER
from tests.lm_eval_tasks import write_task
from tests.unit.evaluation.conftest import DOCUMENTS, QUESTIONS


#: More questions on the subject of the first question, used as examples.
MORE = [{**QUESTIONS[0], "question": f"What is {number} + {number}?", "answer": number} for number in (1, 2)]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = {"mmlu_letter": [0], "mmlu_answer": [0], "heldout_perplexity": [0]}
    config = SuiteConfig(tasks=tasks, heldout=HeldoutConfig(window_bytes=40), batch_size=4)
    return build_suite(QUESTIONS, DOCUMENTS, tmp_path_factory.mktemp("made") / "suite", config)


@pytest.fixture(scope="module")
def result(tiny_llama: Path, suite: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return evaluate(tiny_llama, suite, tmp_path_factory.mktemp("evaluation"), name="tiny")


def loglikelihood(folder: Path, context: str, continuation: str) -> float:
    """Sum log P(continuation | context) over the tokens; an empty context is replaced by <s>."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (context, continuation))
    tokens = (before or [tokenizer.bos_token_id]) + after
    with torch.no_grad():
        logits_SV = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    return sum(float(logits_SV[place - 1, tokens[place]]) for place in range(len(tokens) - len(after), len(tokens)))


def test_perplexity_is_that_of_a_plain_loop(result: dict[str, Any], suite: Path, tiny_llama: Path) -> None:
    windows = [json.loads(line)["text"] for line in (suite / "heldout_perplexity.jsonl").open()]
    expected = [loglikelihood(tiny_llama, "", window) for window in windows]
    found = [item["loglikelihoods"] for item in result["items"]["heldout_perplexity"]]
    assert [value for (value,) in found] == pytest.approx(expected, rel=1e-5)
    metrics = {name.split("/")[1]: entry["value"] for name, entry in result["metrics"].items() if "heldout" in name}
    total, text_bytes = -sum(expected), sum(len(window.encode()) for window in windows)
    words = sum(len(re.split(r"\s+", window)) for window in windows)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-4)
    assert metrics["byte_perplexity"] == pytest.approx(math.exp(total / text_bytes), rel=1e-5)
    assert metrics["bits_per_byte"] == pytest.approx(total / text_bytes / math.log(2), rel=1e-5)


def test_questions_are_scored_as_in_a_plain_loop(result: dict[str, Any], tiny_llama: Path) -> None:
    item = result["items"]["mmlu_letter"][2]
    prompt = (
        "The following are multiple choice questions (with answers) about weather now.\n\n"
        "Which is wet?\nA. fire\nB. ash\nC. dust\nD. rain\nAnswer:"
    )
    expected = [loglikelihood(tiny_llama, prompt, f" {letter}") for letter in "ABCD"]
    assert item["loglikelihoods"] == pytest.approx(expected, rel=1e-5)
    assert item["answer"] == expected.index(max(expected))
    assert item["scores"] == {"acc": float(item["answer"] == 3)}

    item = result["items"]["mmlu_answer"][0]
    answers = ["1", "2", "three", "10"]
    expected = [loglikelihood(tiny_llama, "Question: What is 1 + 1?\nAnswer:", f" {answer}") for answer in answers]
    assert item["loglikelihoods"] == pytest.approx(expected, rel=1e-5)
    normalised = [value / len(answer) for value, answer in zip(expected, answers, strict=True)]
    assert item["scores"]["acc_norm"] == float(normalised.index(max(normalised)) == 1)


def test_examples_of_the_same_subject_stand_above_the_question(tiny_llama: Path, tmp_path: Path) -> None:
    config = SuiteConfig({"mmlu_letter": [1], "mmlu_answer": [1]}, questions=QuestionsConfig(examples=1))
    suite = build_suite([QUESTIONS[0], *MORE], [], tmp_path / "suite", config)
    found = evaluate(tiny_llama, suite, tmp_path / "out", name="tiny")
    row = json.loads((suite / "mmlu_letter_1shot.jsonl").read_text().splitlines()[0])
    (example,) = row["examples"]

    def letters(question: dict[str, Any]) -> str:
        listed = "".join(f"\n{letter}. {text}" for letter, text in zip("ABCD", question["choices"], strict=True))
        return f"{question['question']}{listed}\nAnswer:"

    head = f"The following are multiple choice questions (with answers) about {row['subject']}."
    shown = f"Question: {example['question']}\nAnswer: {example['choices'][example['answer']]}"
    for task, prompt, answers in (
        ("letter", f"{head}\n\n{letters(example)} {'ABCD'[example['answer']]}\n\n{letters(row)}", "ABCD"),
        ("answer", f"{shown}\n\nQuestion: {row['question']}\nAnswer:", row["choices"]),
    ):
        expected = [loglikelihood(tiny_llama, prompt, f" {answer}") for answer in answers]
        assert found["items"][f"mmlu_{task}_1shot"][0]["loglikelihoods"] == pytest.approx(expected, rel=1e-5)


OWN = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def own_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A suite of the user's own tasks, which lie in a folder beside the suite; one task has no data."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "tasks").mkdir()
    for task, rows in (("quiz", QUESTIONS), ("lost", [])):
        write_task(folder / "tasks", task, {"train": MORE, "test": rows}, **OWN)
    (folder / "mine.yaml").write_text("{tasks: {lost: [0], quiz: [0, 1]}, local: false, include_path: tasks}")
    return folder


def test_own_tasks_are_scored_and_missing_data_are_said(own_suite: Path, tiny_llama: Path, tmp_path: Path) -> None:
    suite = build_named_suite(own_suite / "mine.yaml", [], tmp_path / "suite")
    tasks = load_suite_tasks(suite)
    found = evaluate(tiny_llama, suite, tmp_path / "out", name="tiny", tasks=tasks)
    assert list(found["metrics"]) == ["quiz/acc", "quiz_1shot/acc"]
    assert "lost.test.jsonl" in found["missing"]["lost"]
    assert json.loads((tmp_path / "out/tiny.json").read_text())["missing"] == found["missing"]
    alone, shown = (found["items"][task][0]["loglikelihoods"] for task in ("quiz", "quiz_1shot"))
    assert shown != pytest.approx(alone, rel=1e-3)
    again = evaluate(tiny_llama, suite, tmp_path / "out", name="again", tasks=tasks)  # uses the same task objects
    only = build_suite([], [], tmp_path / "only", SuiteConfig({"quiz": [1]}, False, str(own_suite / "tasks")))
    fresh = evaluate(tiny_llama, only, tmp_path / "out", name="fresh")
    assert again["items"] == found["items"]
    assert fresh["items"]["quiz_1shot"] == found["items"]["quiz_1shot"]


def test_refuses_unknown_tasks_before_loading_the_model(own_suite: Path, tmp_path: Path) -> None:
    for name, tasks, strict in (("all", {"lost": [0]}, False), ("one", {"quiz": [0], "lost": [0]}, True)):
        config = SuiteConfig(tasks, False, str(own_suite / "tasks"), strict=strict)
        suite = build_suite([], [], tmp_path / name, config)
        with pytest.raises(UpcycleError, match=r"Data of .*lost are not available.*lost\.test\.jsonl"):
            evaluate(tmp_path / "no_model", suite, tmp_path / "out", name="none")
    assert not (tmp_path / "out").exists()


def test_strict_evaluation_ends_at_missing_tasks(
    own_suite: Path,
    tiny_llama: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["evaluate", str(tiny_llama), str(own_suite / "mine.yaml"), str(tmp_path / "out")]
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    said = capfd.readouterr()
    assert "fatal: " not in said.err, "of git, which is in no repository there"
    assert said.out.startswith(f"{tmp_path / 'out/dense.json'}: "), "it has no experts"
    assert said.out.splitlines()[-1].startswith("lost: not scored, because its data are not available (")
    assert main([*words, "--json"]) == 0
    assert list(json.loads(capfd.readouterr().out)["missing"]) == ["lost"]
    assert main([*words, "--strict"]) == 2
    assert "error: Data of lm-eval task lost are not available: " in capfd.readouterr().err


def test_of_several_ways_to_read_an_answer_the_first_counts() -> None:
    def sample(name: str, score: float) -> dict[str, Any]:
        responses = {"filtered_resps": ["4"], "doc": {}, "doc_id": 0, "doc_hash": "h"}
        return {**responses, "filter": name, "metrics": ["exact_match"], "exact_match": score}

    found = {
        "results": {"gsm8k": {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}},
        "samples": {"gsm8k": [sample("strict-match", 0.0), sample("flexible-extract", 1.0)]},
        "higher_is_better": {},
    }
    extracted = _extract(found, "_5shot")
    assert extracted["metrics"]["gsm8k_5shot/exact_match"]["value"] == 0.0
    assert [item["scores"] for item in extracted["items"]["gsm8k_5shot"]] == [{"exact_match": 0.0}]


def test_the_error_of_held_out_text_is_over_documents(result: dict[str, Any]) -> None:
    sources = by_source(document_sums(result))
    assert [found["documents"] for found in sources.values()] == [1, 1]  # two documents, five windows
    first, second = (found["value"] for found in sources.values())
    # For two documents, the jackknife error is half of their difference.
    assert result["metrics"][BITS]["stderr"] == pytest.approx(abs(first - second) / 2, rel=1e-6)


def test_samples_are_likeliest_tokens(result: dict[str, Any], tiny_llama: Path, suite: Path, tmp_path: Path) -> None:
    """Compare with greedy decoding without a cache; the folder's temperature and penalties must not matter."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    for sample in result["samples"]:
        tokens = tokenizer.encode(sample["prompt"])
        start = len(tokens)
        while len(tokens) < start + 24 and tokens[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert sample["continuation"] == tokenizer.decode(tokens[start:]).removesuffix(tokenizer.eos_token)
    prompts = json.loads((suite / MARKER).read_text())["prompts"]
    assert all(sample.items() >= prompt.items() for sample, prompt in zip(result["samples"], prompts, strict=True))
    sampling = shutil.copytree(tiny_llama, tmp_path / "sampling")
    settings = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_length=4)
    settings.save_pretrained(sampling)
    again = evaluate(sampling, suite, tmp_path, name="sampling", limit=1)
    assert again["samples"] == result["samples"]
    assert evaluate(tiny_llama, suite, tmp_path, name="without", limit=1, samples=False)["samples"] == []


def test_a_file_says_what_was_measured(tiny_llama: Path, suite: Path, result: dict[str, Any], tmp_path: Path) -> None:
    moved = shutil.copytree(suite, tmp_path / "moved")  # a suite works in any folder
    again = evaluate(tiny_llama, moved, tmp_path, name="again", limit=2, options=ModelOptions(batch_size=1))
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(json.dumps(again))
    assert {task: len(items) for task, items in again["items"].items()} == dict.fromkeys(result["items"], 2)
    settings = {"backend": "hf", "dtype": "float32", "device": "cpu", "batch_size": 1, "limit": 2}
    assert again["settings"] == settings
    assert result["settings"]["batch_size"] == 4
    assert again["model"]["class"] == "LlamaForCausalLM"
    assert again["versions"].keys() >= {"lm_eval", "transformers", "torch", "nemo_upcycle", "python"}
    first_two = {**result, "items": {task: items[:2] for task, items in result["items"].items()}}
    assert compare_items(first_two, again)["max_relative_loglikelihood_difference"] < 1e-5


def test_first_tokens_are_never_doubled(tiny_llama: Path, suite: Path, result: dict[str, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "with_bos")
    tokenizer = load_tokenizer(folder)
    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    tokenizer.save_pretrained(folder)
    found = evaluate(folder, suite, tmp_path, name="with_bos")
    assert found["metrics"][BITS] == result["metrics"][BITS]
    assert found["items"]["mmlu_answer"] != result["items"]["mmlu_answer"]


@pytest.mark.parametrize("renamed", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_tensor_with_a_wrong_name_is_an_error(tiny_llama: Path, tmp_path: Path, renamed: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_llama, tmp_path / "renamed")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"wrong.{renamed}"] = tensors.pop(renamed)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="missing_keys") as caught:
        load_model(folder)
    assert f"wrong.{renamed}" in str(caught.value)


def test_what_is_no_model_is_an_error(tiny_llama: Path, suite: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(CheckpointError, match=f"Model {tmp_path} cannot be loaded by transformers"):
        load_model(tmp_path)
    with pytest.raises(UpcycleError, match=r"is not finished: it has no _SUCCESS\.json\. Build the suite"):
        evaluate(tiny_llama, tmp_path, tmp_path, name="none")


@pytest.mark.full
@pytest.mark.parametrize("model", ["hf", "nemo_upcycle"])
def test_lm_evals_own_models_and_ours_are_known(tiny_llama: Path, tmp_path: Path, model: str) -> None:
    write_task(tmp_path, "quiz", {"test": QUESTIONS}, **OWN)
    named = "pretrained" if model == "hf" else "checkpoint"
    words = f"run --model {model} --model_args {named}={tiny_llama} --tasks quiz --include_path {tmp_path}".split()
    command = [sys.executable, "-m", "nemo_upcycle.evaluation", *words, "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "no model for this name" not in done.stderr
    if model == "hf":
        assert done.returncode == 0, done.stderr
        assert "|quiz |" in done.stdout
    else:  # our model reads only checkpoints, and the error says so
        assert "checkpoint" in done.stderr.splitlines()[-1]


#: Held-out answers of three conversations.
ANSWERS = [
    {"document": f"mine.jsonl:{number}", "turn": turn, "prompt": f"user: {number}?\nassistant:", "answer": answer}
    for number, answers in enumerate(((" One.", " Two, or three."), (" É.",), (" No.",)))
    for turn, answer in enumerate(answers)
]


@pytest.fixture(scope="module")
def answered(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("answers")
    build_suite([], [], folder / "suite", SuiteConfig(tasks={"heldout_answers": [0]}), ANSWERS)
    return evaluate(tiny_llama, folder / "suite", folder, name="tiny")


def test_bits_of_answers_are_those_of_a_plain_loop(answered: dict[str, Any], tiny_llama: Path) -> None:
    nats = sum(loglikelihood(tiny_llama, row["prompt"], row["answer"]) for row in ANSWERS)
    size_bytes = sum(len(row["answer"].encode()) for row in ANSWERS)
    assert answered["metrics"][ANSWER_BITS]["value"] == pytest.approx(-nats / math.log(2) / size_bytes, rel=1e-4)
    assert answered["metrics"][ANSWER_BITS]["higher_is_better"] is False


def test_the_answers_of_a_conversation_are_one_observation(answered: dict[str, Any]) -> None:
    paired = paired_difference(answered, answered, ANSWER_BITS)
    assert (paired["difference"], paired["items"], paired["clusters"]) == (0, 4, 3)
    assert answered["metrics"][ANSWER_BITS]["stderr"] > 0


def test_models_are_let_continue_the_prompts(answered: dict[str, Any]) -> None:
    asked = {row["prompt"] for row in ANSWERS}
    assert len(answered["samples"]) == 2
    assert all(sample["prompt"] in asked and "continuation" in sample for sample in answered["samples"])


def test_the_draw_of_answers_ignores_their_order(tmp_path: Path) -> None:
    config = SuiteConfig(tasks={"heldout_answers": [0]}, heldout=HeldoutConfig(answers=2))
    for name, rows in (("one", ANSWERS), ("other", ANSWERS[::-1])):
        build_suite([], [], tmp_path / name, config, rows)
    texts = [(tmp_path / name / "heldout_answers.jsonl").read_text() for name in ("one", "other")]
    assert texts[0] == texts[1]
    assert len(texts[0].splitlines()) == 2
