"""Build the folder of a set of conversations; a failed build leaves no folder.

The folder holds:

training.npy, validation.npy   packs, as NeMo's and Megatron-Bridge's data modules for fine-tuning read them
packing.json          how full the packs are, in NeMo's format
heldout.jsonl         answers to score after training, each with its prompt
tokenizer/            with the chat template
removed.jsonl         every omitted line: file, line, field, reason and fix
manifest.json         counts, licence, files
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_upcycle.data.chat.config import KIND, Chat, ChatConfig, read_chat
from nemo_upcycle.data.chat.finished import FORMAT, PACKING, PACKS, REMOVED, FinishedChat, open_chat
from nemo_upcycle.data.chat.messages import Conversation, Problem, read_conversations
from nemo_upcycle.data.chat.packing import write_packs
from nemo_upcycle.data.chat.template import ChatTemplate, Tokens
from nemo_upcycle.data.finished import HELDOUT, MANIFEST, TOKENIZER
from nemo_upcycle.data.made_from import cached_folder, named_tokenizer, require_same, stamps
from nemo_upcycle.data.tokenizers import open_tokenizer, save_tokenizer
from nemo_upcycle.errors import LostError, UpcycleError
from nemo_upcycle.package_info import __version__
from nemo_upcycle.sources.fetch import ensure_dense, tokenizer_folder
from nemo_upcycle.utils.files import MARKER, is_complete, marker_of, output_folder, read_json, write_json
from nemo_upcycle.utils.progress import track
from nemo_upcycle.utils.schema import numbered


MADE_BY, KEY = FinishedChat.command, FinishedChat.key
_SPLITS = ("train", "validation", "heldout")
#: Reasons to omit a valid line.
_EQUAL, _TOO_LONG = "equal to an earlier one", "longer than a sequence"


def build_chat(chat: Chat, output: Path, *, strict: bool = False) -> dict[str, Any]:
    """Build a set of conversations, or keep a finished folder of the same set.

    Args:
        chat: conversations to pack.
        output: folder to make.
        strict: whether an invalid line ends the build; otherwise it is listed and omitted.

    Returns:
        The manifest.

    Raises:
        UpcycleError: a file, the tokenizer or its chat template is missing; a split has no conversation; a line is
            invalid and `strict` is set; more lines are invalid than `max_lost` allows; or the folder contains
            something else.

    Example:
        >>> build_chat(read_chat("mine.jsonl", ["tokenizer=/models/Llama-3-8B"]), Path("data/mine"))  # doctest: +SKIP
    """
    named = named_tokenizer(chat.config.tokenizer)
    paths = chat.paths()
    made_from = {"format": FORMAT, KEY: _made_by(chat.config), "files": stamps(paths), "strict": strict}
    if is_complete(output):
        earlier = read_json(marker_of(output)).get("made_from") or {}
        if KEY in earlier:
            earlier = earlier | {KEY: _made_by(ChatConfig([])) | earlier[KEY]}
        require_same(output, KEY, earlier, made_from)
        return open_chat(output).manifest
    dense = tokenizer_folder(named)
    tokenizer = open_tokenizer(dense)
    template = ChatTemplate(tokenizer, chat.template_text(), named)
    with output_folder(output, MADE_BY) as folder:
        facts = save_tokenizer(dense, folder / TOKENIZER)
        problems: list[Problem] = []
        conversations = _read(paths, template.special_tokens, problems, strict)
        lines = len(conversations) + len(problems)
        splits = _split(chat, conversations, problems)
        counts = {split: _write(folder, split, splits[split], chat, template, problems, strict) for split in _SPLITS}
        _require_few(chat, problems, lines)
        packings = [counts[split].pop("packing") for split in PACKS]
        write_json(folder / PACKING, packings, indent=None)
        _write_lines(folder / REMOVED, (dataclasses.asdict(problem) for problem in problems))
        manifest = {
            "kind": KIND,
            "format": FORMAT,
            "chat": chat.name,
            "license": chat.config.license,
            "seq_length": chat.config.seq_length,
            "seed": chat.config.seed,
            "tokenizer": facts,
            "splits": counts,
            "packing": dict(zip(PACKS, packings, strict=True)),
            "removed": dict(sorted(Counter(problem.reason for problem in problems).items())),
            "files": {name: (folder / name).stat().st_size for name in (*PACKS.values(), PACKING, HELDOUT, REMOVED)},
            "inputs": [str(path) for path in paths],
            "made_by": {"nemo_upcycle": __version__},
        }
        write_json(folder / MANIFEST, numbered(manifest))
        write_json(folder / MARKER, {"made_by": MADE_BY, "made_from": made_from})
    return manifest


def cached_chat(name: str, dense: str, seq_length: int) -> Path:
    """Return the cached folder of a set of conversations for a dense model; build it on first use.

    Several ranks may call this at the same time: one builds the folder, the others wait.

    Args:
        name: name of the set, as in `read_chat`.
        dense: address of the dense model.
        seq_length: tokens in a sequence.

    Raises:
        UpcycleError: see `build_chat`.
    """
    chat = read_chat(name, [f"tokenizer={ensure_dense(dense)}", f"seq_length={seq_length}"])
    made_from = [FORMAT, dataclasses.asdict(chat.config), stamps(chat.paths())]
    return cached_folder("chats", chat.name, made_from, partial(build_chat, chat))


def _made_by(config: ChatConfig) -> dict[str, Any]:
    """Return the settings that affect the output."""
    return {key: value for key, value in dataclasses.asdict(config).items() if key != "max_lost"}


def _read(
    paths: Sequence[Path], special_tokens: Sequence[str], problems: list[Problem], strict: bool
) -> list[Conversation]:
    """Return each valid conversation once, and add all other lines to `problems`."""
    taken: dict[str, Conversation] = {}
    are_apart = len({path.name for path in paths}) == len(paths)
    for path in paths:
        for found in read_conversations(path, special_tokens, path.name if are_apart else str(path)):
            if isinstance(found, Problem):
                _note(found, problems, strict)
            elif taken.setdefault(found.whole, found) is not found:
                problems.append(Problem(found.place, "", _EQUAL, "add other conversations"))
    return list(taken.values())


def _note(problem: Problem, problems: list[Problem], strict: bool) -> None:
    if strict:
        raise problem.error()
    problems.append(problem)


def _split(chat: Chat, conversations: list[Conversation], problems: list[Problem]) -> dict[str, list[Conversation]]:
    """Return the conversations of each split; conversations that start with the same question stay together."""
    config = chat.config
    together: dict[str, list[Conversation]] = {}
    for conversation in conversations:
        together.setdefault(conversation.question, []).append(conversation)
    ranked = sorted(together, key=lambda question: hashlib.sha256(f"{config.seed} {question}".encode()).digest())
    splits: dict[str, list[Conversation]] = {}
    for split, share in (("heldout", config.heldout), ("validation", config.validation)):
        wanted, splits[split] = max(1, round(share * len(conversations))), []
        while ranked and len(splits[split]) < wanted:
            splits[split] += together[ranked.pop()]
    splits["train"] = [conversation for question in reversed(ranked) for conversation in together[question]]
    for split in _SPLITS:
        if not splits[split]:
            most, fix = _most(problems)
            raise UpcycleError(
                f"Conversations of {chat.name}",
                kind="state",
                got=f"are too few: {len(conversations)} can be used ({most}), and none is left for {split}",
                fix=f"{fix}, so that three or more conversations with different questions remain",
            )
    return splits


def _require_few(chat: Chat, problems: Sequence[Problem], lines: int) -> None:
    """Check that at most `max_lost` of the lines are invalid."""
    wrong = [problem for problem in problems if problem.reason not in (_EQUAL, _TOO_LONG)]
    if len(wrong) > chat.config.max_lost * lines:
        most, fix = _most(wrong)
        enough = math.ceil(100 * len(wrong) / lines) / 100
        raise LostError(
            f"Conversations of {chat.name}",
            kind="state",
            got=(
                f"have mistakes in {len(wrong):,} of {lines:,} lines ({most}), more than max_lost "
                f"({chat.config.max_lost:.0%}) allows"
            ),
            fix=f"{fix}; or set max_lost to {enough:g} to continue without them",
        )


def _most(problems: Sequence[Problem]) -> tuple[str, str]:
    """Describe the most frequent problem of the lines, with an example, and return its fix."""
    if not problems:
        return "no line is wrong", "add conversations"
    reason, count = Counter(problem.reason for problem in problems).most_common(1)[0]
    first = next(problem for problem in problems if problem.reason == reason)
    place = ": ".join(filter(None, (first.place, first.field)))
    return f"{count:,} line{'s' * (count != 1)}: {reason}, {place}", first.fix


def _write(
    folder: Path,
    split: str,
    conversations: list[Conversation],
    chat: Chat,
    template: ChatTemplate,
    problems: list[Problem],
    strict: bool,
) -> dict[str, Any]:
    """Write a split and return its counts, with NeMo's packing metadata if the split is packed."""
    size, kept = chat.config.seq_length, []
    counts = Counter(conversations=0, answers=0, tokens=0, answer_tokens=0, cut=0)
    for found in template.tokens(track(conversations, f"pack {split}", len(conversations))):
        if isinstance(found, Problem):
            _note(found, problems, strict)
            continue
        part: Tokens | None = found
        if len(found.ids) > size + 1:
            part = found.cut(size + 1) if chat.config.too_long == "cut" else None
        if part is None:
            problems.append(Problem(found.place, "messages", _TOO_LONG, "raise seq_length"))
            continue
        kept.append(part)
        counts.update(
            answers=len(part.ends),
            tokens=len(part.ids),
            answer_tokens=int(part.is_answer.sum()),
            cut=part is not found,
        )
    counts["conversations"] = len({part.place for part in kept})
    if not kept:
        most, fix = _most(problems)
        raise UpcycleError(
            f"Conversations of {chat.name} for {split}",
            kind="state",
            got=f"do not fit: all {len(conversations)} were left out ({most})",
            fix=fix,
        )
    if split in PACKS:
        packing = write_packs(folder / PACKS[split], kept, size, chat.config.seed)
        return {**counts, "packs": packing["packs"], "packing": packing}
    fit: Counter[str] = Counter()
    for part in kept:
        fit[part.place] += len(part.ends)
    rows = [row for one in conversations for row in _asked(one, template, fit[one.place])]
    _write_lines(folder / HELDOUT, rows)
    return {**counts, "answers": len(rows)}


def _asked(conversation: Conversation, template: ChatTemplate, answers: int) -> list[dict[str, Any]]:
    turns = template.asked(conversation) if answers else []
    assert not isinstance(turns, Problem)
    return [
        {"document": conversation.place, "turn": number, "prompt": turn.prompt, "answer": turn.answer}
        for number, turn in enumerate(turns[:answers])
    ]


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as handle:
        handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
