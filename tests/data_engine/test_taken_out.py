"""A source that is taken out of a stopped build leaves what a build without it makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("datatrove")

from nemo_upcycle.data.engine.tasks import BEGUN
from tests.data_engine.blend import run, sentence, tokens, write_jsonl, write_plan


def _plan(folder: Path, *, with_first: bool, most: int | None = None, **more: object) -> Path:
    """A plan of three sources of two tasks each, which share texts; the first one may read nothing."""
    tasks = []
    for number, source in enumerate(("first", "second", "third")):
        for part in range(2):
            numbers = range(100 * number + 30 * part, 100 * number + 30 * part + 40)
            file = write_jsonl(folder / f"{source}/{part}.jsonl", *map(sentence, [*range(10), *numbers]))
            files = [file] if with_first or number else []
            tasks.append({"source": source, "files": files, "split": None, "max_tokens": most})
    return write_plan(folder, tasks, hold_out={"validation": 0.1}, **more)


def _texts(work: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in work.glob("tokens/*.idx"):
        rank, split = path.name.removesuffix(".idx").split(".")
        found[path.name] = tokens(work, int(rank), split)
    return found


NEAR = {"heldout_overlap": 0.5, "near_duplicates": {"bands": 14, "hashes_per_band": 8, "n_grams": 5}}


@pytest.mark.parametrize(
    "steps",
    [{"deduplicate": True}, {"deduplicate": False}, {"deduplicate": True} | NEAR, {"deduplicate": True, "most": 500}],
    ids=["equal texts", "all texts", "near and held-out texts", "some of the tokens"],
)
def test_source_taken_out_gives_what_a_build_without_it_gives(tmp_path: Path, steps: dict[str, Any]) -> None:
    wanted = _plan(tmp_path / "fresh", with_first=False, **steps)
    assert run(wanted, "--workers", "1").returncode == 0
    plan = _plan(tmp_path / "one", with_first=True, **steps)
    assert run(plan, "--workers", "1").returncode == 0
    before = _texts(plan.parent)
    kept = {path: path.stat().st_mtime_ns for path in plan.parent.glob("stats/*")}
    begun = (plan.parent / BEGUN).read_text()
    _plan(tmp_path / "one", with_first=False, **steps)
    done = run(plan, "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert _texts(plan.parent) == _texts(wanted.parent) != before
    written = {path.name for path in kept if path.stat().st_mtime_ns != kept[path]}
    again = {"00002.json", "00003.json", "00004.json", "00005.json"} if steps["deduplicate"] else set()
    assert written == {"00000.json", "00001.json"} | again  # the others lost no text to the first
    (plan.parent / BEGUN).write_text(begun)  # as a kill leaves it after the rest was forgotten
    assert run(plan, "--workers", "1").returncode == 0
    assert _texts(plan.parent) == _texts(wanted.parent)


def test_other_changes_are_refused_as_before(tmp_path: Path) -> None:
    plan = _plan(tmp_path, with_first=True)
    assert run(plan).returncode == 0
    content = json.loads(plan.read_text())
    content["tasks"][0] |= {"files": []}
    content["tasks"][2] |= {"files": content["tasks"][3]["files"]}
    plan.write_text(json.dumps(content))
    refused = run(plan)
    assert refused.returncode == 2
    assert "work of another plan (other: tasks)" in refused.stderr
