"""A text is found exactly where the decoded documents contain it, however the tokenizer splits it."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from nemo_upcycle.data.find import documents_with
from tests.hostile import HOSTILE


END = 0
_WORDS = [
    "the",
    "state",
    "of",
    "naïve",
    "日本語",
    "cafés",
    "is",
    "strong,",
    "stronger;",
    "12345",
    "",
    "x≠y\n\n\tif",
    "👩\u200d👩",
]


def _documents(count: int = 300) -> list[str]:
    numbers = random.Random(3)
    return [" ".join(numbers.choices(_WORDS, k=numbers.randint(3, 30))) for _ in range(count)]


def _byte_level() -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer, trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )


def _sentencepiece() -> Any:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<end>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tokenizer, trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, limit_alphabet=30, show_progress=False
    )


def _word_pieces() -> Any:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["<end>", "<unk>"], show_progress=False)


KINDS = {"byte level": _byte_level, "SentencePiece": _sentencepiece, "word pieces": _word_pieces}


class _Corpus:
    """Documents in the tokens of a tokenizer, and the texts that these tokens stand for."""

    def __init__(self, kind: str, texts: list[str]) -> None:
        self.tokenizer, trainer = KINDS[kind]()
        self.tokenizer.train_from_iterator(_documents(), trainer)
        self.tokenizer.encode_special_tokens = True
        ids = [[*self.tokenizer.encode(text).ids, END] for text in texts]
        self.texts = [self.tokenizer.decode(one[:-1], skip_special_tokens=False) for one in ids]
        self.lengths = np.array([*map(len, ids)], np.int32)
        self.ids = np.concatenate(ids).astype(np.uint16)

    def search(self, text: str) -> list[int]:
        return [*documents_with(text, self.tokenizer, END, self.lengths, self.ids)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_of_a_document_is_found_everywhere(kind: str) -> None:
    corpus, numbers = _Corpus(kind, _documents()), random.Random(7)
    for _ in range(150):
        text = numbers.choice(corpus.texts)
        start, end = sorted(numbers.sample(range(len(text) + 1), 2))
        found = [number for number, one in enumerate(corpus.texts) if text[start:end] in one]
        if text[start:end].strip():
            assert corpus.search(text[start:end]) == found


@pytest.mark.parametrize("kind", ["byte level", "SentencePiece"])
def test_text_across_two_documents_is_not_found(kind: str) -> None:
    corpus = _Corpus(kind, _documents(40))
    for one, following in pairwise(corpus.texts):
        text = one[-12:] + following[:12]
        assert corpus.search(text) == [number for number, each in enumerate(corpus.texts) if text in each]


def test_normalised_text_is_found_as_typed() -> None:
    corpus = _Corpus("word pieces", ["The State is STRONG", "of", "the state"])
    assert corpus.search("STATE") == corpus.search("state") == [0, 2]


def test_name_of_the_end_token_is_found_only_as_text() -> None:
    corpus = _Corpus("byte level", ["the state", "the <end> of", "strong"])
    assert corpus.search("<end>") == [1]


@pytest.mark.parametrize("attack", sorted({*HOSTILE} - {"surrogate"}))
def test_hostile_text_is_only_compared(attack: str) -> None:
    text = HOSTILE[attack]
    corpus = _Corpus("byte level", ["the state", f"the {text} of", "strong"])
    assert corpus.search(text) == [1]


def test_bytes_that_are_no_text_are_not_found() -> None:
    assert _Corpus("byte level", ["a?b", "a\ufffdb"]).search(HOSTILE["surrogate"]) == []
