"""Conversations become packs with the loss on the answers; mistakes are named, and no folder is left half written."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemo_upcycle.data.chat.build_chat import build_chat
from nemo_upcycle.data.chat.config import read_chat
from nemo_upcycle.data.chat.finished import open_chat
from nemo_upcycle.data.chat.messages import Conversation, Problem, read_conversations
from nemo_upcycle.data.chat.packing import pack
from nemo_upcycle.data.chat.template import ChatTemplate, Tokens
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.hf_model import load_tokenizer
from tests.chats import FORGETS, TEMPLATE, TOOLS, asks_tool, messages, sums, write_chat_tokenizer, write_lines


PLAIN = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
CALL = '<call>weather {"city": "Köln"}</call>'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("parent"))


def _build(tokenizer: Path, folder: Path, lines: list[Any], *overrides: str, strict: bool = False) -> dict[str, Any]:
    path = write_lines(folder / "mine.jsonl", lines)
    values = [f"tokenizer={tokenizer}", "seq_length=96", "validation=0.1", "heldout=0.1", *overrides]
    return build_chat(read_chat(path, values), folder / "chat", strict=strict)


def _read(folder: Path, line: Any) -> Conversation:
    (found,) = read_conversations(write_lines(folder / "mine.jsonl", [line]))
    assert isinstance(found, Conversation)
    return found


def _tokens(folder: Path, conversation: Conversation | list[dict[str, Any]], template: str | None = None) -> list[Any]:
    if isinstance(conversation, list):
        conversation = Conversation("mine.jsonl:1", conversation)
    return list(ChatTemplate(load_tokenizer(folder), template, "the parent").tokens([conversation]))


def _texts(folder: Path, tokens: Tokens) -> tuple[str, str]:
    decode = load_tokenizer(folder).decode
    return decode(tokens.ids), decode(tokens.ids[tokens.is_answer])


def _answered(**more: Any) -> list[dict[str, Any]]:
    return [*messages("How?"), {"role": "assistant", "content": "So.", **more}]


def _called(function: Any) -> list[dict[str, Any]]:
    return _answered(content=None, tool_calls=[{"function": function}])


#: Case -> chat template, messages, the whole rendered text, and the part that counts in the loss.
SCORED: dict[str, tuple[str | None, list[dict[str, Any]], str, str]] = {
    "answers, and what ends each": (
        None,
        messages("How?", "So.", "Why?", "Thus."),
        "user: How?</s>\nassistant: So.</s>\nuser: Why?</s>\nassistant: Thus.</s>",
        "So.</s>Thus.</s>",
    ),
    "an answer that the template does not end": (PLAIN, messages("How?", "So."), "How? So. </s>", "So. </s>"),
    "calls of tools": (
        TOOLS,
        asks_tool(),
        f"user: Warm?</s>assistant: {CALL}</s>tool: 5 degrees</s>assistant: No.</s>",
        f"{CALL}</s>No.</s>",
    ),
    "thoughts": (TOOLS, _answered(reasoning_content="hm"), "user: How?</s>assistant: [hm]So.</s>", "[hm]So.</s>"),
}


@pytest.mark.parametrize("what", SCORED)
def test_the_loss_is_on_answers_as_the_template_writes_them(tokenizer: Path, tmp_path: Path, what: str) -> None:
    template, conversation, whole, scored = SCORED[what]
    (tokens,) = _tokens(tokenizer, _read(tmp_path, conversation), template)
    assert _texts(tokenizer, tokens) == (whole, scored)


def test_a_rewriting_template_gives_a_sequence_per_answer(tokenizer: Path) -> None:
    found = _tokens(tokenizer, messages("How?", "[hm]So.", "Why?", "[ah]Thus."), FORGETS)
    assert [_texts(tokenizer, tokens) for tokens in found] == [
        ("user: How?</s>assistant: [hm]So.</s>", "[hm]So.</s>"),
        ("user: How?</s>assistant: So.</s>user: Why?</s>assistant: [ah]Thus.</s>", "[ah]Thus.</s>"),
    ]


def test_a_template_that_asks_otherwise_than_it_writes_is_named(tokenizer: Path) -> None:
    other = TEMPLATE.replace("assistant: {% endif", "Assistant: {% endif")
    (found,) = _tokens(tokenizer, messages("How?", "So."), other)
    assert isinstance(found, Problem)
    assert found.field == "messages[1]"


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        ("{", "", "broken JSON"),
        ("[1]", "", "no JSON object"),
        ('{"text": "How?"}', "messages", "missing"),
        ('{"messages": [], "x": 1}', "messages", "no list of messages"),
        ('{"messages": ["How?"]}', "messages[0]", "no JSON object"),
        (messages("How?"), "messages", "no answer to learn"),
        (messages("How?", " "), "messages[1].content", "an empty answer"),
        (messages("How?", "So.")[1:], "messages", "no question"),
        (messages("How?", "So.")[1:] + messages("How?", "So."), "messages[0].role", "an answer before any question"),
        ([{"role": "User", "content": "How?"}], "messages[0].role", "none of system, user, assistant, tool"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"role": "user", "content": 5}], "messages[0].content", "not a string"),
        ([{"role": "user", "content": ["How?"]}], "messages[0].content", "a part that is no JSON object"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content", "a text part without text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image_url"}]}],
            "messages[0].content",
            "a part of type 'image_url'; only text parts are read",
        ),
        ('{"conversations": [{"from": "bot", "value": "a"}]}', "conversations[0].from", "none of system, human, gpt"),
        ('{"conversations": [{"from": "human"}]}', "conversations[0].value", "missing"),
        (
            '{"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]}',
            "conversations",
            "no question",
        ),
        ('{"conversations": [{"from": "gpt", "value": "a"}], "system": "b"}', "system", "beside the conversation"),
        (messages("How?</s>assistant: So.", "No."), "messages[0].content", "the name of a special token"),
        (_answered(weight=0.5), "messages[1].weight", "neither 0 nor 1"),
        ([{"role": "user", "content": "How?", "weight": 1}], "messages[0].weight", "on what is no answer"),
        (_answered(tool_calls="weather()"), "messages[1].tool_calls", "no list of JSON objects"),
        (_called({"arguments": "{}"}), "messages[1].tool_calls", "a call without the name of a function"),
        (
            _called({"name": "f", "arguments": "{"}),
            "messages[1].tool_calls",
            "a call with broken JSON in its arguments",
        ),
        (_called({"name": "</s>"}), "messages[1].tool_calls", "the name of a special token"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content", "half of a surrogate pair"),
    ],
)
def test_a_wrong_line_is_named_by_field_and_reason(tmp_path: Path, line: Any, field: str, reason: str) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [messages("How?", "So."), line])
    good, bad = read_conversations(path, ["</s>"])
    assert isinstance(good, Conversation)
    assert isinstance(bad, Problem)
    assert (bad.place, bad.field, bad.reason) == ("mine.jsonl:2", field, reason)


@pytest.mark.parametrize(
    "line",
    [
        {"conversations": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So.", "weight": 1}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Ho"}, {"type": "text", "text": "w?"}]},
                *messages("How?", "So.")[1:],
            ]
        },
    ],
    ids=["ShareGPT", "parts"],
)
def test_other_forms_are_read_as_messages(tokenizer: Path, tmp_path: Path, line: dict[str, Any]) -> None:
    (tokens,) = _tokens(tokenizer, _read(tmp_path, json.dumps(line)))
    (expected,) = _tokens(tokenizer, messages("How?", "So."))
    assert (
        _texts(tokenizer, tokens) == _texts(tokenizer, expected) == ("user: How?</s>\nassistant: So.</s>", "So.</s>")
    )


def test_there_is_no_loss_on_an_answer_of_weight_0(tokenizer: Path, tmp_path: Path) -> None:
    turns = messages("How?", "So.", "Why?", "Thus.", "And?", "Ah.")
    turns[1]["weight"], turns[3]["weight"], turns[5]["weight"] = 0, 1, 0
    conversation = _read(tmp_path, turns)
    (tokens,) = _tokens(tokenizer, conversation)
    whole, scored = _texts(tokenizer, tokens)
    assert whole == "user: How?</s>\nassistant: So.</s>\nuser: Why?</s>\nassistant: Thus.</s>"
    assert scored == "Thus.</s>"
    chat = ChatTemplate(load_tokenizer(tokenizer), None, "the parent")
    assert [turn.answer for turn in chat.asked(conversation)] == ["Thus.</s>"]  # type: ignore[union-attr]


EMPTY = TEMPLATE.replace(
    "{{ message['content'] }}", "{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}"
)
NO_TOOL = TOOLS.replace("in messages", "in messages if message.role != 'tool'")


@pytest.mark.parametrize(
    ("template", "conversation", "tools", "field"),
    [
        (TEMPLATE, asks_tool(), None, "messages[1].tool_calls"),
        (TEMPLATE, [*asks_tool()[:1], asks_tool()[1] | {"content": "I look."}], None, "messages[1].tool_calls"),
        (TEMPLATE, _answered(reasoning_content="hm"), None, "messages[1].reasoning_content"),
        (TEMPLATE, _answered(), [{"name": "weather"}], "tools"),
        (NO_TOOL, asks_tool(), [{"name": "weather"}], "messages[2].content"),
        (EMPTY, _answered(), None, "messages[1]"),
    ],
)
def test_what_the_template_does_not_write_is_refused_by_name(
    tokenizer: Path, tmp_path: Path, template: str, conversation: list[dict[str, Any]], tools: Any, field: str
) -> None:
    line = json.dumps({"messages": conversation, "tools": tools})
    (found,) = _tokens(tokenizer, _read(tmp_path, line), template)
    assert isinstance(found, Problem)
    assert (found.place, found.field) == ("mine.jsonl:1", field)
    assert "chat_template" in found.fix


def test_bytes_that_are_not_utf_8_cost_their_line_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [messages("How?", "So.")])
    path.write_bytes(b"\xff\xfe{}\n" + path.read_bytes())
    bad, good = read_conversations(path)
    assert bad == Problem("mine.jsonl:1", "", "not UTF-8")
    assert isinstance(good, Conversation)


def test_packs_hold_every_sequence_once_and_are_full() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, size=500).tolist()
    packs = pack(lengths, 100, seed=0)
    assert sorted(number for numbers in packs for number in numbers) == list(range(500))
    assert max(sum(lengths[number] for number in numbers) for numbers in packs) <= 100
    assert len(packs) <= sum(lengths) / 100 * 1.06


def test_a_folder_holds_what_its_manifest_counts(tokenizer: Path, tmp_path: Path) -> None:
    manifest = _build(tokenizer, tmp_path, [*sums(), "{", messages("1 + 1?", "2.", "again?")])
    chat = open_chat(tmp_path / "chat")
    rows = np.load(chat.folder / "training.npy", allow_pickle=True)
    train = manifest["splits"]["train"]
    assert sum(int(row["loss_mask"].sum()) for row in rows) == train["answer_tokens"]
    assert sum(len(row["input_ids"]) for row in rows) == train["tokens"]
    assert all(len(row["input_ids"]) - len(row["seq_start_id"]) <= 96 for row in rows)
    conversations = [manifest["splits"][split]["conversations"] for split in ("train", "validation", "heldout")]
    assert sum(conversations) == 41
    assert min(conversations) >= 4
    assert manifest["removed"] == {"broken JSON": 1}
    removed = {"place": "mine.jsonl:41", "field": "", "reason": "broken JSON", "fix": "correct or delete the line"}
    assert json.loads((chat.folder / "removed.jsonl").read_text()) == removed


def test_the_mask_of_a_pack_is_that_of_the_labels(tokenizer: Path, tmp_path: Path) -> None:
    """Labels are shifted by one token: the loss on an answer's first token is at the prompt's last position."""
    _build(tokenizer, tmp_path, sums())
    decode = load_tokenizer(tokenizer).decode
    for row in np.load(tmp_path / "chat/training.npy", allow_pickle=True):
        borders = [*row["seq_start_id"], len(row["input_ids"])]
        for begin, end in itertools.pairwise(borders):
            ids, mask = row["input_ids"][begin:end], row["loss_mask"][begin:end].astype(bool)
            answers = [turn.split("</s>")[0] + "</s>" for turn in decode(ids).split("assistant: ")[1:]]
            assert decode(ids[1:][mask[:-1]]) == "".join(answers)
            assert not mask[-1]


def test_does_not_train_on_questions_of_held_out_answers(tokenizer: Path, tmp_path: Path) -> None:
    """Two conversations with the same first question are either both held out or both trained on."""
    lines = [one for a in range(20) for one in (messages(f"{a}?", "Yes."), messages(f"{a}?", "No."))]
    _build(tokenizer, tmp_path, lines)
    asked = {row["prompt"] for row in open_chat(tmp_path / "chat").held_out["answers"]}
    decode = load_tokenizer(tokenizer).decode
    trained = "".join(decode(row["input_ids"]) for row in np.load(tmp_path / "chat/training.npy", allow_pickle=True))
    assert len(asked) == 2
    assert not any(prompt in trained for prompt in asked)


def test_held_out_answers_end_where_the_model_has_to_stop(tokenizer: Path, tmp_path: Path) -> None:
    _build(tokenizer, tmp_path, [*sums(), *(asks_tool(f"Warm in {n}?") for n in range(40))], "max_lost=0.5")
    rows = open_chat(tmp_path / "chat").held_out["answers"]
    assert {row["turn"] for row in rows} >= {0, 1}
    for row in rows:
        assert row["prompt"].endswith("</s>\nassistant: ")
        assert row["answer"].endswith(".</s>")


def test_cuts_long_conversations_after_the_last_answer_that_fits(tokenizer: Path, tmp_path: Path) -> None:
    long = messages("Who?", "Me.", "And who else?", "x" * 100)
    manifest = _build(tokenizer, tmp_path, [*sums(), long])
    assert sum(manifest["splits"][split]["cut"] for split in ("train", "validation", "heldout")) == 1
    dropped = _build(tokenizer, tmp_path / "dropped", [*sums(), long], "too_long=drop")
    assert dropped["removed"] == {"longer than a sequence": 1}


def test_a_strict_build_ends_at_the_first_wrong_line(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UpcycleError, match=r"mine\.jsonl:2: messages is missing"):
        _build(tokenizer, tmp_path, [sums()[0], "{}", *sums()[1:]], strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]


def test_more_wrong_lines_than_allowed_end_the_build(tokenizer: Path, tmp_path: Path) -> None:
    lines = [*sums(), *([messages("How?")] * 3), *(asks_tool(f"Warm in {n}?") for n in range(6))]
    with pytest.raises(UpcycleError, match="9 of 49 lines") as caught:
        _build(tokenizer, tmp_path, lines)
    assert "6 lines: tool_calls that the chat template does not write" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
    assert caught.value.exit_status == 1
    assert "max_lost to 0.19" in caught.value.fix
    manifest = _build(tokenizer, tmp_path, lines, "max_lost=0.19")
    assert sum(manifest["removed"].values()) == 9


def test_refuses_a_tokenizer_without_chat_template(tmp_path: Path) -> None:
    plain = write_chat_tokenizer(tmp_path / "base", template=None)
    with pytest.raises(UpcycleError, match=r"The tokenizer of .*base has no chat template"):
        _build(plain, tmp_path, sums())
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    assert _build(plain, tmp_path, sums(), "chat_template=own.jinja")["splits"]["train"]["packs"]


def test_the_same_conversations_are_kept_and_others_refused(tokenizer: Path, tmp_path: Path) -> None:
    _build(tokenizer, tmp_path, sums())
    before = (tmp_path / "chat/training.npy").stat().st_mtime_ns
    values = [f"tokenizer={tokenizer}", "seq_length=96", "validation=0.1", "heldout=0.1"]
    build_chat(read_chat(tmp_path / "mine.jsonl", values), tmp_path / "chat")
    assert (tmp_path / "chat/training.npy").stat().st_mtime_ns == before
    with pytest.raises(UpcycleError, match=r"holds another chat \(seed differ\)"):
        build_chat(read_chat(tmp_path / "mine.jsonl", [*values, "seed=1"]), tmp_path / "chat")


def test_a_damaged_folder_is_refused_by_file(tokenizer: Path, tmp_path: Path) -> None:
    _build(tokenizer, tmp_path, sums())
    (tmp_path / "chat/validation.npy").write_bytes(b"short")
    with pytest.raises(UpcycleError, match=r"validation\.npy has 5 bytes instead of \d+"):
        open_chat(tmp_path / "chat")


@pytest.mark.parametrize(("key", "value"), [("too_long", "trim"), ("heldout", 0.0), ("seq_length", 1)])
def test_a_wrong_value_is_named(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(UpcycleError) as caught:
        read_chat(tmp_path / "mine.jsonl", [f"{key}={value}"])
    assert caught.value.subject.endswith(f": {key}")
    assert caught.value.got == value


def test_a_conversation_is_tokenised_as_a_whole(tmp_path: Path) -> None:
    """This tokenizer adds a leading blank, as SentencePiece tokenizers do. Tokenising in pieces would add blanks."""
    from tokenizers import pre_tokenizers

    folder = write_chat_tokenizer(tmp_path / "parent")
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    chat = ChatTemplate(tokenizer, TEMPLATE, "the parent")
    (tokens,) = chat.tokens([Conversation("mine.jsonl:1", messages("How?", "So.", "Why?", "Thus."))])
    assert isinstance(tokens, Tokens)
    rendered = "user: How?</s>\nassistant: So.</s>\nuser: Why?</s>\nassistant: Thus.</s>"
    assert tokens.ids.tolist() == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens.ids[tokens.is_answer]) == "So.</s>Thus.</s>"
