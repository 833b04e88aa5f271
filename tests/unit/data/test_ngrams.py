from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from nemo_upcycle.data.ngrams import NgramIndex
from nemo_upcycle.data.passages import Hit, cut, removed_spans
from nemo_upcycle.data.suites.items import Item
from nemo_upcycle.errors import UpcycleError


QUESTION = "Which of the two came first, the hen or the egg, and who was there to see it?"


def index_of(*texts: str, **options: int) -> NgramIndex:
    return NgramIndex.build([Item("quiz", str(number), (text,)) for number, text in enumerate(texts)], **options)


def slow_find(items: list[Item], text: str, words: int, shortest: int, boilerplate: int) -> list[Hit]:
    """Find n-grams in the slow and obvious way."""
    owners: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for number, item in enumerate(items):
        for rendering in item.renderings:
            parts = rendering.lower().split()
            size = min(len(parts), words)
            if size >= shortest:
                for at in range(len(parts) - size + 1):
                    owners[tuple(parts[at : at + size])].add(number)
    found = [(match.group().lower(), match.start(), match.end()) for match in re.finditer(r"\w+", text)]
    hits: list[tuple[int, int, set[int]]] = []
    for at in range(len(found)):
        for size in range(shortest, words + 1):
            who = owners.get(tuple(word for word, *_ in found[at : at + size]), set())
            if len(found) < at + size or not 0 < len(who) <= boilerplate:
                continue
            if hits and at < hits[-1][1]:
                first, last, before = hits.pop()
                hits.append((first, max(last, at + size), before | who))
            else:
                hits.append((at, at + size, who))
    return [Hit(found[first][1], found[last - 1][2], last - first, tuple(sorted(who))) for first, last, who in hits]


@pytest.mark.parametrize("seed", range(8))
def test_finds_what_an_obvious_search_finds(seed: int) -> None:
    rng = random.Random(seed)
    vocabulary = ["a", "be", "See", "d\u00e9", "EE", "\u65e5"][: rng.randint(2, 6)]

    def some_words(least: int, most: int) -> str:
        return " ".join(rng.choice(vocabulary) for _ in range(rng.randint(least, most)))

    words, shortest = rng.choice([(13, 6), (8, 6), (5, 3), (4, 4), (1, 1)])
    items = [Item("set", str(n), tuple(some_words(1, 20) for _ in range(3))) for n in range(30)]
    plain = [Item(i.name, i.id, tuple(r.replace("\u00e9", "e") for r in i.renderings)) for i in items]
    pieces = [piece for item in items for piece in (some_words(1, 1500), rng.choice(item.renderings))]
    text = re.sub(" ", lambda _: rng.choice([" ", ", ", "\n", " \u2014 "]), " ".join(pieces))
    boilerplate = rng.choice([3, 30])
    index = NgramIndex.build(items, words, shortest, boilerplate)
    expected = slow_find(plain, text.replace("\u00e9", "e"), words, shortest, boilerplate)
    assert index.find(text) == expected
    assert expected or boilerplate == 3


def test_short_items_are_found_whole_only() -> None:
    index = index_of("what is the speed of light", "how fast is it", "what is the speed of sound in air at sea level")
    assert [hit.items for hit in index.find("Ask: what is the speed of light? And how fast is it?")] == [(0,)]
    assert index.find("what is the speed of sound in air at a level") == []
    assert [hit.size for hit in index.find("what is the speed of sound in air at sea level")] == [11]
    assert index.summary["quiz"] == {"items": 3, "ngrams": 2, "ignored": 0, "too_short": 1, "only_boilerplate": 0}


def test_ngrams_of_many_items_are_ignored_and_counted_by_set() -> None:
    intro = "for which of these two scenarios does the main character do something that is clearly wrong"
    many = [Item("morals", str(n), (f"{intro} scenario {n} he did number {n} of the things",)) for n in range(11)]
    only = Item("other", "only", (intro,))
    rare = Item("other", "rare", ("an item that nobody else has, with more than a dozen words in it altogether",))
    index = NgramIndex.build([*many, only, rare])
    assert index.find(f"They asked: {intro}.") == []
    assert [hit.items for hit in index.find(many[7].renderings[0])] == [(7,)]
    assert index.summary["morals"]["ignored"] == 5  # four n-grams in the intro, and one that ends with "scenario"
    assert index.summary["other"]["ignored"] == 4
    assert index.summary["other"]["only_boilerplate"] == 1
    assert index.item(12) == ("other", "rare")
    assert NgramIndex.build([*many[:10], only, rare]).find(intro)[0].items == (*range(10), 10)


def test_passages_that_share_words_are_one_and_others_are_not() -> None:
    index = index_of("one two three four five six seven", "five six seven eight nine ten", words=6)
    text = "one two three four five six seven eight nine ten. One two three four five six."
    assert index.find(text) == [Hit(0, 48, 10, (0, 1)), Hit(50, 77, 6, (0,))]


@pytest.mark.parametrize("text", ["", " ", "\n\0\n", "?!", "\u2019\u2019", "\ud800", "word"])
def test_text_without_words_has_no_hits(text: str) -> None:
    assert index_of(QUESTION).find(text) == []
    assert index_of().find(text) == []
    assert cut(text, []) == [part for part in [text] if part.strip()]


def test_saved_index_finds_the_same_and_has_the_same_bytes(tmp_path: Path) -> None:
    built, again = (index_of(QUESTION, "what is the speed of light") for _ in range(2))
    built.save(tmp_path / "deep/one.npz")
    again.save(tmp_path / "two.npz")
    assert (tmp_path / "deep/one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    loaded = NgramIndex.load(tmp_path / "two.npz")
    text = f"{QUESTION} What is the speed of light?"
    assert loaded.find(text) == built.find(text) != []
    assert loaded.summary == built.summary
    assert loaded.item(1) == ("quiz", "1")


def test_hashes_stay_the_same_in_every_version() -> None:
    index = index_of("what is the speed of light", "Stra\u00dfe na\u00efve don\u2019t 1,000 x\u00b2 end")
    hashes = [hex(value) for value in index.arrays["long_hashes"].tolist()]
    assert hashes == ["0x62fc94c9d8d4b568", "0xf0337b0ec4f5ef2f"]  # saved indices depend on these hashes


LONG = (
    "Which of these seven rivers carries more water to the sea than all of the others taken together, and which of the"
    " lakes that lie on its way is the deepest? A. the first B. the fourth C. the last D. none that has a name"
)


def near(text: str) -> tuple[list[Hit], list[Hit]]:
    return NgramIndex.build([Item("rivers", "0", (LONG,))], short_words=8).search(text)


def test_item_with_one_word_in_ten_changed_is_a_hit() -> None:
    words = [word if place % 10 != 4 else "otherwise" for place, word in enumerate(LONG.split())]
    hits, passages = near("It is well known. " + " ".join(words) + " So he said.")
    assert hits == passages
    assert {hit.items for hit in hits} == {(0,)}
    assert sum(hit.size for hit in hits) >= 0.6 * len(words)


def test_one_short_ngram_is_reported_and_no_hit() -> None:
    eight = " ".join(LONG.split()[:8])
    hits, passages = near(f"He asked {eight} ships than the others. " + "Time went by. " * 50 + f"Then {eight} boats?")
    assert hits == []
    assert [passage.size for passage in passages] == [8, 8]  # a repeated n-gram counts once


def test_distant_short_ngrams_of_an_item_are_no_hit() -> None:
    first, second = " ".join(LONG.split()[:8]), " ".join(LONG.split()[20:28])
    assert near(f"{first} {'and then ' * 30} {second}") == ([], near(f"{first} {'and then ' * 30} {second}")[1])
    assert len(near(f"{first} {'and then ' * 3} {second}")[0]) == 2


def test_ignores_rows_of_digits_and_single_letters() -> None:
    row = "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15"
    items = [Item("sums", "0", (f"{row}. Which is next? A. 16 B. 17 C. 18 D. 19",)), Item("sums", "1", (row,))]
    index = NgramIndex.build(items, short_words=8)
    assert index.search(f"list(range(16)) gives [{row}] and {row}") == ([], [])
    assert [hit.items for hit in index.find(items[0].renderings[0])] == [(0,)]
    assert index.summary["sums"]["too_short"] == 1


def test_what_is_no_index_is_refused(tmp_path: Path) -> None:
    index, cut_short, newer = index_of(QUESTION), tmp_path / "cut.npz", tmp_path / "newer.npz"
    index.save(cut_short)
    cut_short.write_bytes(cut_short.read_bytes()[:-200])
    np.savez(newer, **{**index.arrays, "settings": index.arrays["settings"] + 1})
    for path in (cut_short, newer):
        with pytest.raises(
            UpcycleError, match=rf"N-gram index .*{path.name} is damaged, or not of version \d+ .*Delete it"
        ):
            NgramIndex.load(path)


def test_cut_ends_between_words_where_one_is_near() -> None:
    text = "x" * 500
    assert removed_spans(text, [Hit(250, 260, 1, (0,))], 100) == [(150, 360)]
    assert removed_spans(text, [Hit(140, 360, 1, (0,))], 100) == [(0, 500)]  # no fragment of a word is left
    assert cut("one two three four five six", [Hit(9, 12, 1, (0,))], 0) == ["one two", "four five six"]


def test_cut_joins_margins_that_meet_in_any_order_of_hits() -> None:
    text = "word " * 200
    hits = [Hit(600, 604, 1, (0,)), Hit(100, 104, 1, (0,)), Hit(150, 154, 1, (0,)), Hit(100, 400, 60, (0,))]
    spans = removed_spans(text, hits, 50)
    assert spans == [(49, 455), (549, 655)]
    assert cut(text, hits, 50) == [text[:49], text[455:549], text[655:]]


#: Questions in scripts that do not separate words with blanks, and other text to put around them.
QUESTIONS = {
    "zh": "下列哪一种气体在地球大气层中所占的比例最大。",
    "zh, short": "世界上面积最大的海洋是哪一个。",
    "ja": "次のうち、地球の大気中に最も多く含まれている気体はどれですか。",
    "ko": "다음 중 지구 대기에서 가장 많은 비율을 차지하는 기체는 무엇입니까?",
    "th": "ก๊าซชนิดใดมีสัดส่วนมากที่สุดในชั้นบรรยากาศของโลก",
    "km": "តើឧស្ម័នមួយណាមានច្រើនជាងគេនៅក្នុងបរិយាកាសរបស់ផែនដី",
}
AROUND = {
    "zh": "我们昨天去了城里的图书馆、借了几本关于历史和地理的书、然后回家吃了晚饭。",
    "ja": "昨日は町の図書館へ行って歴史や地理の本を何冊か借りてから家に帰って夕食を食べました。",
    "ko": "우리는 어제 시내 도서관에 가서 역사와 지리에 관한 책을 몇 권 빌린 다음 집으로 돌아와 저녁을 먹었다.",
    "th": "เมื่อวานเราไปห้องสมุดในเมืองยืมหนังสือประวัติศาสตร์และภูมิศาสตร์มาหลายเล่มแล้วกลับบ้านไปกินข้าวเย็น",
    "km": "ម្សិលមិញយើងបានទៅបណ្ណាល័យក្នុងទីក្រុងខ្ចីសៀវភៅប្រវត្តិសាស្ត្រជាច្រើនក្បាលហើយត្រឡប់មកផ្ទះវិញ",
}
ASKED = NgramIndex.build([Item("quiz", name, (text,)) for name, text in QUESTIONS.items()], short_words=8)


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("between", ["\n", ""])
def test_question_is_found_on_its_line_and_inside_text(name: str, form: str, between: str) -> None:
    around, question = AROUND[name[:2]], QUESTIONS[name]
    text = unicodedata.normalize(form, f"{around}{between}{question}{between}{around}")
    (hit,) = ASKED.find(text)
    assert ASKED.item(hit.items[0])[1] == name
    found = unicodedata.normalize("NFC", text[hit.start : hit.stop])
    assert found[:-1] in unicodedata.normalize("NFC", question)
    assert len(found) >= 0.9 * len(question)


@pytest.mark.parametrize("name", QUESTIONS)
def test_blanks_inside_a_question_do_not_matter(name: str) -> None:
    question, around = QUESTIONS[name], AROUND[name[:2]]
    (hit,) = ASKED.find(f"{around}{' '.join(question)}{around}")
    assert ASKED.item(hit.items[0])[1] == name


@pytest.mark.parametrize("language", AROUND)
def test_other_text_is_not_found(language: str) -> None:
    assert ASKED.search(AROUND[language] * 3) == ([], [])
