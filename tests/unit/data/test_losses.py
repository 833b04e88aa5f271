"""What could not be read of a source is counted by bytes and documents; too much of it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend import Blend, BlendConfig, SourceConfig
from nemo_upcycle.data.losses import count_lost, require_read
from nemo_upcycle.errors import LostError


def lost(reason: str, documents: int, size_bytes: int, files: int = 0) -> dict[str, Any]:
    """Return what a task of the engine counts as lost, for one reason."""
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
    one, other = (
        lost("broken JSON", 1, 10),
        {"broken JSON": lost("broken JSON", 2, 30)["broken JSON"] | {"first": "b:1"}},
    )
    found = count_lost([_task(10, 100, one), _task(10, 100, other)])
    assert found["reasons"] == {"broken JSON": {"documents": 3, "bytes": 40, "first": "a.jsonl:7"}}


def test_more_than_a_source_may_lose_is_refused_with_status_1() -> None:
    tasks = [_task(10, 1000, lost("truncated compressed file", 1, 334))]
    with pytest.raises(LostError) as caught:
        require_read(_blend(), "web", tasks)
    assert caught.value.exit_status == 1
    assert "sources.web.max_lost to 0.34" in caught.value.fix
    require_read(_blend(max_lost=0.34), "web", tasks)


@pytest.mark.parametrize(
    ("reader", "documents", "is_named"), [("files", 6, True), ("files", 5, False), ("packages", 6, False)]
)
def test_field_that_holds_most_texts_is_named_where_it_can_be_set(reader: str, documents: int, is_named: bool) -> None:
    tasks = [_task(10, 1000, lost("no field text", documents, 500), id=50, body=450)]
    with pytest.raises(LostError) as caught:
        require_read(_blend(reader=reader), "web", tasks)
    assert ("sources.web.options.text_key=body" in caught.value.fix) == is_named


def test_a_little_is_warned_about_and_less_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    require_read(_blend(), "web", [_task(1000, 10_000, lost("broken JSON", 2, 10))])
    assert capsys.readouterr().err == ""
    require_read(_blend(), "web", [_task(100, 1000, lost("broken JSON", 2, 10))])
    assert capsys.readouterr().err.startswith("warning: source web: 2.0% of what was to be read is lost (2 documents")
