"""Unreadable parts of a source are counted. Too many unreadable parts or too little text are refused early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend import Blend, BlendConfig, SourceConfig
from nemo_upcycle.data.losses import count_lost, require_read, size_check
from nemo_upcycle.errors import LostError, UpcycleError
from nemo_upcycle.utils.files import write_json


def lost(reason: str, documents: int, size_bytes: int, files: int = 0) -> dict[str, Any]:
    """Return an engine task's record of documents that were lost for one reason."""
    return {reason: {"documents": documents, "bytes": size_bytes, "files": files, "first": "a.jsonl:7"}}


def _task(documents: int, size_bytes: int, lost: dict[str, Any], **fields: int) -> dict[str, Any]:
    read = {"read": {"in": documents, "removed": {}}}
    return {"bytes_in": size_bytes, "files": {"a": {}}, "lost": lost, "fields": fields, "steps": read}


def _blend(**more: Any) -> Blend:
    return Blend("mine", Path(), BlendConfig({"web": SourceConfig(train=["x"], **more)}))


@pytest.mark.parametrize(
    ("tasks", "share"),
    [
        ([_task(0, 0, {})], 0),
        ([_task(3, 1000, lost("line too long", 1, 997))], 0.997),
        ([_task(10, 1000, lost("no field text", 2, 0))], 0.2),
        ([_task(10, 400, {}), _task(11, 400, lost("missing file", 1, 0, files=1))], 0.3333),
        ([_task(1, 0, lost("missing file", 1, 0, files=1))], 1),
    ],
)
def test_share_is_the_larger_one_of_documents_and_bytes(tasks: list[dict[str, Any]], share: float) -> None:
    assert count_lost(tasks)["share"] == share


def test_reasons_of_all_tasks_are_summed_with_the_first_place() -> None:
    other = {"broken JSON": {"documents": 2, "bytes": 30, "files": 0, "first": "b:1"}}
    found = count_lost([_task(10, 100, lost("broken JSON", 1, 10)), _task(10, 100, other)])
    assert found["reasons"] == {"broken JSON": {"documents": 3, "bytes": 40, "first": "a.jsonl:7"}}


def test_losing_more_than_allowed_ends_with_status_1() -> None:
    tasks = [_task(10, 1000, lost("truncated compressed file", 1, 334))]
    with pytest.raises(LostError) as caught:
        require_read(_blend(), "web", tasks)
    assert caught.value.exit_status == 1
    assert "sources.web.max_lost to 0.34" in caught.value.fix
    require_read(_blend(max_lost=0.34), "web", tasks)


@pytest.mark.parametrize(
    ("reader", "documents", "is_named"), [("files", 6, True), ("files", 5, False), ("packages", 6, False)]
)
def test_names_the_field_that_holds_most_texts(reader: str, documents: int, is_named: bool) -> None:
    tasks = [_task(10, 1000, lost("no field text", documents, 500), id=50, body=450)]
    with pytest.raises(LostError) as caught:
        require_read(_blend(reader=reader), "web", tasks)
    assert ("sources.web.options.text_key=body" in caught.value.fix) == is_named


PLAN = {"tasks": [{"source": "web"}, {"source": "tiny"}, {"source": "web"}]}


def _two() -> Blend:
    sources = {"web": SourceConfig(train=["x"], weight=3.0), "tiny": SourceConfig(train=["y"])}
    return Blend("mine", Path(), BlendConfig(sources, seq_length=64))


def _write(work: Path, kind: str, rank: int, documents: int, size: int, **more: object) -> None:
    train = {"documents": documents, "bytes": size}
    counts = train if kind == "read" else {"splits": {"train": train | {"tokens": size // 4}}}
    read = {"read": {"in": documents, "kept": documents, "removed": {}}}
    record = {"bytes_in": size, "files": {"a": {}}, "lost": {}, "fields": {}, "steps": read} | more
    write_json(work / kind / f"{rank:05d}.json", record | counts)


def _check(work: Path) -> Callable[[], None]:
    """Return the size check of a build whose engine has started."""
    write_json(work / "engine.json", {"plan": PLAN})
    return size_check(_two(), work, PLAN)


def test_source_without_a_sequence_is_refused_once_it_is_read(tmp_path: Path) -> None:
    check = size_check(_two(), tmp_path, PLAN)
    _write(tmp_path, "read", 1, 2, 50)
    check()  # passes: without engine.json, the record may belong to an earlier plan
    write_json(tmp_path / "engine.json", {"plan": PLAN})
    with pytest.raises(UpcycleError) as caught:
        check()
    said = (
        "has at most 54 tokens to train on, in 2 of 2 documents. A source of 25.0% of a run needs more than"
        " one sequence (64 tokens)"
    )
    assert str(caught.value).startswith(f"Source tiny {said}")


def test_source_without_a_sequence_is_refused_once_it_is_tokenised(tmp_path: Path) -> None:
    check = _check(tmp_path)
    _write(tmp_path, "read", 1, 2, 240)
    check()
    _write(tmp_path, "stats", 0, 10, 4000)
    check()
    _write(tmp_path, "stats", 1, 2, 240)
    with pytest.raises(UpcycleError, match="Source tiny has 60 tokens to train on, in 2 of 2 documents"):
        check()


def test_explains_a_source_with_nothing_left(tmp_path: Path) -> None:
    steps = {"read": {"in": 9, "removed": {"no field text": 7}}, "filter": {"in": 2, "removed": {"too short": 2}}}
    _write(tmp_path, "read", 1, 0, 0, steps=steps, lost=lost("no field text", 7, 70), fields={"id": 9, "body": 60})
    with pytest.raises(UpcycleError) as caught:
        _check(tmp_path)()
    lost_text = "7 documents, 70 bytes: no field text, first at a.jsonl:7; 2 documents: too short"
    assert f"0 of 9 documents ({lost_text})" in str(caught.value)
    assert "set sources.tiny.options.text_key=body (fields of text there: body, id)" in caught.value.fix
    assert caught.value.exit_status == 2


def test_source_is_warned_about_once_above_one_per_cent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_read(_blend(), "web", [_task(1000, 10_000, lost("broken JSON", 2, 10))])
    assert capsys.readouterr().err == ""
    check = _check(tmp_path)
    for kind in ("read", "stats"):
        _write(tmp_path, kind, 1, 100, 4000, lost=lost("broken JSON", 2, 10))
        check()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: source tiny loses 2.0% of its text (2 documents, 10 bytes: broken")


def test_shares_and_epochs_are_shown_once_all_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = _check(tmp_path)
    _write(tmp_path, "read", 0, 100, 30_000_000)
    _write(tmp_path, "read", 1, 100, 4_000_000)
    check()
    assert capsys.readouterr().err == ""
    _write(tmp_path, "read", 2, 100, 10_000_000)
    check()
    check()
    _, web, tiny = capsys.readouterr().err.splitlines()
    assert web.startswith("  web: 75.0% of a run, about 10,000,000 tokens: 1 epoch in a run of 13,333,333 tokens")
    assert tiny.startswith("  tiny: 25.0% of a run, about 1,000,000 tokens: 1 epoch in a run of 4,000,000 tokens")
