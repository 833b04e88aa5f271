from __future__ import annotations

import unicodedata

import numpy as np
import pytest

from nemo_upcycle.data.word_hashes import normalise, origin, word_blocks


def words_of(text: str) -> list[str]:
    return [word.decode() for word in normalise(text).split(b"\0") if word]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop-now", ["dont", "stop", "now"]),
        ("Don\u2019t stop\u2014now", ["dont", "stop", "now"]),
        ("rock \u2018n\u2019 roll", ["rock", "n", "roll"]),
        ("one\r\n\ttwo\u00a0three\u2003four", ["one", "two", "three", "four"]),
        ("co\u00adoperate zero\u200bwidth", ["cooperate", "zerowidth"]),
        ("Stra\u00dfe STRASSE", ["strasse", "strasse"]),
        ("na\u00efve nai\u0308ve NAIVE", ["naive", "naive", "naive"]),
        ("x\u00b2 = \u00bd", ["x2", "1", "2"]),
        ("\u041c\u043e\u0441\u043a\u0432\u0430 \u65e5\u672c\u3002\u8a9e", ["mockba", "\u65e5", "\u672c", "\u8a9e"]),
        ("1,000 snake_case $x^2$ a\0b", ["1", "000", "snake", "case", "x", "2", "a", "b"]),
        ("\ud800 lone", ["lone"]),
        ("\u0410\u0420\u03a1LE \u0430\u0440\u0440l\u0435 \uff41\uff50\uff50\uff4c\uff45", ["apple", "apple", "apple"]),
        ("the <b>speed</b> of<br/>light<span class='x'>!</span>", ["the", "speed", "of", "light"]),
        ("a &amp; b don&#39;t don&rsquo;t x&nbsp;y", ["a", "b", "dont", "dont", "x", "y"]),
        ("if a<b and c>d: <int> <unk>", ["if", "a", "b", "and", "c", "d", "int", "unk"]),
        ("\u30c7\u30fc\u30bf \uff83\uff9e\uff70\uff80", ["\u30c6", "\u30fc", "\u30bf"] * 2),
        ("\ud55c\uae00 \u1112\u1161\u11ab\u1100\u1173\u11af", ["\u1112\u1161\u11ab", "\u1100\u1173\u11af"] * 2),
        ("\u0e1b\u0e35\u0e17\u0e35\u0e48", ["\u0e1b", "\u0e17"]),
        ("", []),
    ],
)
def test_words_do_not_depend_on_typography(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_each_character_is_normalised_on_its_own() -> None:
    every = [chr(code) for code in range(0x3000) if unicodedata.category(chr(code)) != "Cs"]
    text = "".join(f"{char}a" for char in every)
    assert normalise(text) == b"".join(normalise(char) for char in text)
    places = origin(text)
    assert len(places) == len(normalise(text))
    for place, letter in zip(places.tolist(), normalise(text), strict=True):
        assert letter in normalise(text[place])


def test_blocks_give_every_ngram_in_every_way() -> None:
    text = " ".join(f"w{number % 7919}" for number in range(20_000))
    places: dict[int, int] = {}
    for block in word_blocks(normalise(text), 12):
        hashes = block.grams(13)
        some = np.arange(0, len(hashes), 7)
        np.testing.assert_array_equal(hashes[some], block.grams(13, some))
        for place, value in enumerate(hashes.tolist()):
            assert places.setdefault(block.first + place, value) == value
    assert sorted(places) == list(range(20_000 - 12))
    assert len(set(places.values())) == 7919  # equal words have equal hashes, and different n-grams do not collide


def test_word_longer_than_a_block_is_hashed_in_parts() -> None:
    blocks = list(word_blocks(normalise("a" * 200_000 + " the end"), 2))
    assert blocks[-1].stops[-1] == 200_008
    assert len(blocks) > 5


@pytest.mark.parametrize("style", ["{n:4d}  {line}", "{n}: {line}", "{n}|{line}", "{n}\t{line}"])
def test_numbers_of_lines_are_no_words(style: str) -> None:
    lines = ["in the year", "1990 came 12", "of 30 and", "7 more", "than", "before 5"]
    text = "\n" + "\n".join(style.format(n=n, line=line) for n, line in enumerate(lines, 98))
    assert normalise(text).split(b"\0").count(b"98") == 0
    assert [word for word in normalise(text).split(b"\0") if word] == " ".join(lines).encode().split()
    assert len(origin(text)) == len(normalise(text))


@pytest.mark.parametrize("numbers", [[1, 2, 3, 4], [1, 2, 4, 5, 6, 8, 9], [1990, 1980, 12, 13, 14, 15]])
def test_other_numbers_at_the_start_of_lines_are_words(numbers: list[int]) -> None:
    words = normalise("".join(f"\n{number} of them" for number in numbers)).split(b"\0")
    assert [int(word) for word in words if word.isdigit()] == numbers
