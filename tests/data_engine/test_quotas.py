"""A source gives the requested number of tokens, counted after all removals."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data_engine.blend import QUESTION, sentence, write_index, write_jsonl, write_plan
from tests.data_engine.runs import execute, stats, tokens


def _plan(folder: Path, most: int | None, **more: object) -> Path:
    """Write a source of three tasks: the second mostly repeats the first, and the third has evaluation items."""
    unique = [sentence(number, 5 + number % 30) for number in range(1500)]
    around = " ".join(f"word{n}" for n in range(60))
    asked = [f"{n} {around} {QUESTION if n % 2 else ''} {around[::-1]}" for n in range(200)]
    many = [unique[:900], [*unique[:800], *unique[900:1000]], [*asked, *unique[1000:]]]
    files = [write_jsonl(folder / f"input/{task}.jsonl", *texts) for task, texts in enumerate(many)]
    tasks = [{"files": [file], "split": None, "max_tokens": most, "on_hit": "cut"} for file in files]
    return write_plan(folder, tasks, hold_out={"validation": 0.05}, ngram_index=write_index(folder), **more)


def _trained(work: Path) -> list[list[list[int]]]:
    return [tokens(work, rank) for rank in range(3)]


def _total(work: Path) -> int:
    return sum(len(document) for task in _trained(work) for document in task)


@pytest.mark.parametrize("deduplicate", [True, False])
def test_source_gives_what_was_asked_for_of_what_is_left(tmp_path: Path, deduplicate: bool) -> None:
    whole = execute(_plan(tmp_path / "all", None, deduplicate=deduplicate))
    there = _total(whole)
    for part in (0.2, 0.97):
        work = execute(_plan(tmp_path / str(part), int(part * there), deduplicate=deduplicate))
        assert int(part * there) - 30 < _total(work) <= int(part * there)
        for some, every in zip(_trained(work), _trained(whole), strict=True):
            rest = iter(every)
            assert all(one in rest for one in some)  # in the same order
            its_part = part * sum(map(len, every))
            assert sum(map(len, some)) == pytest.approx(its_part, rel=0.25)
        assert all(set(stats(work, rank)["steps"]["tokenise"]["removed"]) == {"max_tokens"} for rank in range(3))
        assert len(tokens(work, 0, "validation")) == len(tokens(whole, 0, "validation"))
        assert all(file["whole"] for rank in range(3) for file in stats(work, rank)["files"].values())


def test_source_that_has_less_gives_all(tmp_path: Path) -> None:
    works = [execute(_plan(tmp_path / str(most), most)) for most in (None, 10_000_000)]
    assert _trained(works[0]) == _trained(works[1])


def test_another_source_has_a_quota_of_its_own(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n}.jsonl", *map(sentence, range(1000 * n, 1000 * n + 400))) for n in range(3)]
    most = (2_000, 4_000, None)
    tasks = [{"source": str(n), "files": [file], "max_tokens": most[n]} for n, file in enumerate(files)]
    given = [sum(map(len, task)) for task in _trained(execute(write_plan(tmp_path, tasks)))]
    assert given[:2] == pytest.approx([2_000, 4_000], rel=0.01)
    assert len(_trained(tmp_path / "work")[2]) == 400
