"""Near duplicates: pairs of many kinds are found, the first document stays, and merely similar documents stay."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.data_engine.blend import MINHASH, write_jsonl, write_plan
from tests.data_engine.runs import execute, removed, stats, texts
from tests.near import NEAR


def document(seed: int, paragraphs: int = 5) -> str:
    """Return paragraphs of words that documents of other seeds also use."""
    chance = random.Random(seed)
    words = [f"wört{n}" for n in range(300)]
    return "\n\n".join(f"{' '.join(chance.choices(words, k=80)).capitalize()}." for _ in range(paragraphs))


ORIGINALS = [document(n) for n in range(4)]


def _run(folder: Path, *tasks: list[str], **plan: Any) -> Path:
    files = [write_jsonl(folder / f"{number}.jsonl", *many) for number, many in enumerate(tasks)]
    return execute(write_plan(folder, [{"files": [file]} for file in files], near_duplicates=MINHASH, **plan))


@pytest.mark.parametrize("kind", NEAR)
def test_first_of_a_pair_stays(tmp_path: Path, kind: str) -> None:
    changed = [NEAR[kind](text, random.Random(number)) for number, text in enumerate(ORIGINALS)]
    assert not set(changed) & set(ORIGINALS)
    work = _run(tmp_path, ORIGINALS, [document(10), *changed, document(11)])
    assert texts(work, 0) == ORIGINALS
    assert texts(work, 1) == [document(10), document(11)]
    assert stats(work, 1)["steps"]["deduplicate"]["removed"] == {"near duplicate": 4}
    lines = removed(work, 1)
    assert {(line["step"], line["reason"]) for line in lines} == {("deduplicate", "near duplicate")}
    assert [line["where"].rpartition(":")[2] for line in lines] == ["2", "3", "4", "5"]


def test_first_of_a_chain_stays_though_others_have_more_pairs(tmp_path: Path) -> None:
    """Each document lacks a tenth of the previous document. The first and the last are not near duplicates."""
    chain = [document(1, paragraphs=10)]
    while len(chain) < 6:
        chain.append("\n\n".join([*chain[-1].split("\n\n")[1:], document(100 + len(chain), paragraphs=1)]))
    work = _run(tmp_path, chain[:1], chain[1:])
    assert (texts(work, 0), texts(work, 1)) == (chain[:1], [])
    assert texts(_run(tmp_path / "two", [chain[0], chain[5]])) == [chain[0], chain[5]]


def test_documents_that_share_some_passages_stay(tmp_path: Path) -> None:
    alike = [f"{document(1, 2)}\n\n{document(n, 5)}" for n in range(20, 40)]
    many = [*alike, "four words of it", "four words of its"]
    assert texts(_run(tmp_path, many)) == many


def test_long_documents_are_signed_in_pieces(tmp_path: Path) -> None:
    long = document(1, paragraphs=200)
    work = _run(tmp_path, [long], [NEAR["one word changed"](long, random.Random(1)), document(2, paragraphs=200)])
    assert texts(work, 1) == [document(2, paragraphs=200)]
