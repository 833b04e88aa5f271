"""Render conversations with a model's chat template, and find the answers in them.

A prompt is rendered up to the point where the model begins to answer. If the tokenizer allows it, prompt and answer
are tokenised separately, so that the first token of the answer is the token that the model has to produce. The loss
covers each answer and the token that ends it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from typing import Any

import numpy as np
from jinja2 import TemplateError

from nemo_upcycle.data.chat.messages import BESIDE, Conversation, Problem
from nemo_upcycle.errors import UpcycleError


#: Conversations that are tokenised in one call.
_BATCH = 512
#: Errors that a template raises if it refuses a conversation.
_REFUSED = (TemplateError, TypeError, KeyError)
_OTHER_TEMPLATE = "set chat_template to a Jinja file that writes it, or delete the line"


@dataclass(frozen=True)
class Tokens:
    """A sequence to train on: a whole conversation, or one of its answers with all text before the answer.

    Attributes:
        place: place of the conversation.
        ids: ids of its tokens, int32.
        is_answer: whether the loss covers each token, bool.
        ends: for each answer, the number of tokens up to its end.
    """

    place: str
    ids: np.ndarray
    is_answer: np.ndarray
    ends: tuple[int, ...]

    def cut(self, length: int) -> Tokens | None:
        """Keep the tokens up to the last answer that ends within `length`; return None if there is no such answer."""
        ends = tuple(end for end in self.ends if end <= length)
        return Tokens(self.place, self.ids[: ends[-1]], self.is_answer[: ends[-1]], ends) if ends else None


@dataclass(frozen=True)
class Turn:
    """A prompt and its answer.

    The prompt is the text since the previous answer. In the result of `ChatTemplate.asked`, the prompt is the whole
    text before the answer. The answer includes the text that ends it.
    """

    prompt: str
    answer: str


class ChatTemplate:
    """A tokenizer with its own chat template, or with a template that replaces it.

    Args:
        tokenizer: tokenizer of transformers.
        source: Jinja template that replaces the tokenizer's own, or None.
        where: name of the tokenizer's model, for errors.

    Raises:
        UpcycleError: there is no template.
    """

    def __init__(self, tokenizer: Any, source: str | None, where: str) -> None:
        self.tokenizer, self.source = tokenizer, source or tokenizer.chat_template
        if not self.source:
            raise UpcycleError(
                f"The tokenizer of {where}",
                kind="missing",
                got="has no chat template: the model was not tuned for conversations",
                fix="set chat_template to a Jinja file, such as the template of the model's Instruct version",
            )
        if isinstance(self.source, dict):  # several templates, by name
            self.source = self.source.get("default") or next(iter(self.source.values()))
        added = tokenizer.added_tokens_decoder
        self.special_ids = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self.special_tokens = tuple(tokenizer.convert_ids_to_tokens(sorted(self.special_ids)))
        self._ends = re.compile("|".join(map(re.escape, self.special_tokens)))
        # SentencePiece tokenizers put a blank before each text, so they must tokenise a conversation as a whole.
        alone = tokenizer("so", add_special_tokens=False)["input_ids"]
        self._is_additive = "".join(tokenizer.convert_ids_to_tokens(alone)) == "so"

    def conversations(self, conversation: Conversation) -> list[list[Turn]] | Problem:
        """Return the texts to train on: one text with all turns, or one text for each answer.

        Some templates write earlier answers in another form than the last answer, for example without thoughts. Then
        each answer gets a text of its own, with the prompt that the model will be given before this answer.
        """
        answers, turns, before = conversation.answers(), [], ""
        try:
            rendered = [self._rendered(conversation, number) for number in answers]
            unread = self._unread(conversation)
        except _REFUSED as error:
            return Problem(conversation.place, conversation.field, f"the chat template refuses it: {error}")
        if unread:
            reason = f"{unread.rpartition('.')[2]} that the chat template does not write"
            return Problem(conversation.place, unread, reason, _OTHER_TEMPLATE)
        for number, (prompt, whole) in zip(answers, rendered, strict=True):
            if not whole.startswith(prompt):
                reason = "the chat template writes an answer in another way than it asks for one"
                return Problem(conversation.place, f"{conversation.field}[{number}]", reason)
            if not self._ends.sub("", whole[len(prompt) :]).strip():
                reason = "an answer of which the chat template writes nothing"
                return Problem(conversation.place, f"{conversation.field}[{number}]", reason, _OTHER_TEMPLATE)
        for prompt, whole in rendered:
            if not prompt.startswith(before):
                return [[Turn(prompt, whole[len(prompt) :])] for prompt, whole in rendered]
            turns.append(Turn(prompt[len(before) :], whole[len(prompt) :]))
            before = whole
        return [turns]

    def _rendered(self, conversation: Conversation, answer: int) -> tuple[str, str]:
        """Render the prompt before an answer, and the prompt together with the answer."""
        before, up_to = (replace(conversation, messages=conversation.messages[: answer + n]) for n in (0, 1))
        return self._render(before, add_generation_prompt=True), self._render(up_to)

    def _unread(self, conversation: Conversation) -> str:
        """Return the first field that the template ignores, or "" if it reads all fields."""
        messages, field = conversation.messages, conversation.field
        for number, message in enumerate(messages):
            before, up_to = (replace(conversation, messages=messages[: number + n]) for n in (0, 1))
            if message["role"] == "tool" and self._writes_same(up_to, before):
                return f"{field}[{number}].content"
            for name in filter(message.get, BESIDE):
                without = {key: value for key, value in message.items() if key != name}
                if self._writes_same(up_to, replace(conversation, messages=[*messages[:number], without])):
                    return f"{field}[{number}].{name}"
        if conversation.tools and self._writes_same(conversation, replace(conversation, tools=None)):
            return "tools"
        return ""

    def _writes_same(self, conversation: Conversation, other: Conversation) -> bool:
        whole = self._render(conversation)
        try:
            return whole == self._render(other)
        except _REFUSED:
            return False

    def _render(self, conversation: Conversation, *, add_generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            chat_template=self.source,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return text

    def tokens(self, conversations: Iterable[Conversation]) -> Iterator[Tokens | Problem]:
        """Yield, for each conversation in order, the sequences to train on or the problem."""
        rest = iter(conversations)
        while batch := list(islice(rest, _BATCH)):
            rendered = [(conversation.place, self.conversations(conversation)) for conversation in batch]
            texts = [turns for _, found in rendered if not isinstance(found, Problem) for turns in found]
            ids = iter(
                self._ids([[piece for turn in turns for piece in (turn.prompt, turn.answer)] for turns in texts])
            )
            for place, found in rendered:
                if isinstance(found, Problem):
                    yield found
                else:
                    for _ in found:
                        pieces = iter(next(ids))
                        yield self._joined(place, list(zip(pieces, pieces, strict=True)))

    def _ids(self, texts: list[list[str]]) -> list[list[list[int]]]:
        """Return the token ids of each piece of each text."""
        if self._is_additive:
            flat = [piece for pieces in texts for piece in pieces]
            ids = iter(self.tokenizer(flat, add_special_tokens=False)["input_ids"] if flat else [])
            return [[next(ids) for _ in pieces] for pieces in texts]
        return [self._ids_of_whole(pieces) for pieces in texts]

    def _ids_of_whole(self, pieces: list[str]) -> list[list[int]]:
        """Tokenise one text as a whole, and assign each token to the piece in which it begins."""
        whole = self.tokenizer("".join(pieces), add_special_tokens=False, return_offsets_mapping=True)
        ends: list[int] = list(accumulate(map(len, pieces)))
        found: list[list[int]] = [[] for _ in pieces]
        for number, (start, _) in zip(whole["input_ids"], whole["offset_mapping"], strict=True):
            found[min(bisect_right(ends, start), len(pieces) - 1)].append(number)
        return found

    def _joined(self, place: str, turns: list[tuple[list[int], list[int]]]) -> Tokens:
        ids: list[int] = []
        is_answer: list[bool] = []
        ends: list[int] = []
        for number, (prompt, answer) in enumerate(turns):
            scored = self._scored(answer)
            if not scored and number == len(turns) - 1:  # nothing else would tell the model to stop
                answer = [*answer, self.tokenizer.eos_token_id]
            scored = scored or len(answer)
            ids += prompt + answer
            is_answer += [False] * len(prompt) + [True] * scored + [False] * (len(answer) - scored)
            ends.append(len(ids) - len(answer) + scored)
        return Tokens(place, np.array(ids, np.int32)[: ends[-1]], np.array(is_answer)[: ends[-1]], tuple(ends))

    def _scored(self, answer: Sequence[int]) -> int:
        """Count the tokens that the model must write, up to the answer's last special token; 0 if none exists."""
        return next((number + 1 for number in reversed(range(len(answer))) if answer[number] in self.special_ids), 0)

    def asked(self, conversation: Conversation) -> list[Turn] | Problem:
        """Return each answer of a conversation, with the whole text that the model is given before this answer.

        The text of an answer ends where the model has to stop.
        """
        texts = self.conversations(conversation)
        if isinstance(texts, Problem):
            return texts
        asked = []
        for turns in texts:
            before = ""
            for turn in turns:
                asked.append(Turn(before + turn.prompt, self._stopped(turn.answer)))
                before += turn.prompt + turn.answer
        return asked

    def _stopped(self, answer: str) -> str:
        """Return an answer without the text that a template writes after its last special token."""
        ends = [answer.rfind(name) + len(name) for name in self.special_tokens if name in answer]
        return answer[: max(ends)] if ends else answer
