"""Too small a source is refused when its tasks say so, with its numbers; and what a run would draw is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_upcycle.data.blend import Blend, BlendConfig, SourceConfig
from nemo_upcycle.data.build import _as_begun
from nemo_upcycle.data.sizes import size_check
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import write_json
from tests.unit.data.test_losses import lost


PLAN = {"tasks": [{"source": "web"}, {"source": "tiny"}, {"source": "web"}]}


def _blend(**more: object) -> Blend:
    sources = {"web": SourceConfig(train=["x"], weight=3.0), "tiny": SourceConfig(train=["y"])}
    return Blend("mine", Path(), BlendConfig(sources, seq_length=64, **more))  # type: ignore[arg-type]


def _write(work: Path, kind: str, rank: int, documents: int, size: int, **more: object) -> None:
    train = {"documents": documents, "bytes": size}
    counts = train if kind == "read" else {"splits": {"train": train | {"tokens": size // 4}}}
    read = {"read": {"in": documents, "kept": documents, "removed": {}}}
    record = {"bytes_in": size, "files": {"a": {}}, "lost": {}, "fields": {}, "steps": read} | more
    write_json(work / kind / f"{rank:05d}.json", record | counts)


def test_source_without_a_sequence_is_refused_once_it_is_read(tmp_path: Path) -> None:
    check = size_check(_blend(), tmp_path, PLAN)
    _write(tmp_path, "read", 1, 2, 50)
    check()  # of an earlier plan, as far as it knows
    write_json(tmp_path / "engine.json", {"plan": PLAN})
    with pytest.raises(UpcycleError) as caught:
        check()
    assert str(caught.value).startswith(
        "source tiny: got at most 54 tokens to train on, in 2 of 2 documents, expected more than a sequence (64)"
    )


def test_source_without_a_sequence_is_refused_once_it_is_tokenised(tmp_path: Path) -> None:
    write_json(tmp_path / "engine.json", {"plan": PLAN})
    check = size_check(_blend(), tmp_path, PLAN)
    _write(tmp_path, "read", 1, 2, 240)
    check()
    _write(tmp_path, "stats", 0, 10, 4000)
    check()
    _write(tmp_path, "stats", 1, 2, 240)
    with pytest.raises(UpcycleError, match="source tiny: got 60 tokens to train on, in 2 of 2 documents"):
        check()


def test_source_of_which_nothing_is_left_says_what_became_of_it(tmp_path: Path) -> None:
    write_json(tmp_path / "engine.json", {"plan": PLAN})
    steps = {"read": {"in": 9, "removed": {"no field text": 7}}, "filter": {"in": 2, "removed": {"too short": 2}}}
    _write(tmp_path, "read", 1, 0, 0, steps=steps, lost=lost("no field text", 7, 70), fields={"id": 9, "body": 60})
    with pytest.raises(UpcycleError) as caught:
        size_check(_blend(), tmp_path, PLAN)()
    text = str(caught.value)
    assert (
        "0 of 9 documents (7 documents, 70 bytes: no field text, first at a.jsonl:7; 2 documents: too short)" in text
    )
    assert "set sources.tiny.options.text_key=body (fields of text there: body, id), in another folder" in text
    assert caught.value.exit_status == 2


def test_source_is_warned_about_once_above_one_per_cent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "engine.json", {"plan": PLAN})
    check = size_check(_blend(), tmp_path, PLAN)
    for kind in ("read", "stats"):
        _write(tmp_path, kind, 1, 100, 4000, lost=lost("broken JSON", 2, 10))
        check()
    assert capsys.readouterr().err == (
        "warning: source tiny: 2.0% of what was to be read is lost (2 documents, 10 bytes: broken JSON,"
        " first at a.jsonl:7)\n"
    )


def test_shares_and_epochs_are_shown_once_all_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "engine.json", {"plan": PLAN})
    check = size_check(_blend(), tmp_path, PLAN)
    _write(tmp_path, "read", 0, 100, 30_000_000)
    _write(tmp_path, "read", 1, 100, 4_000_000)
    check()
    assert capsys.readouterr().err == ""
    _write(tmp_path, "read", 2, 100, 10_000_000)
    check()
    check()
    assert capsys.readouterr().err.splitlines() == [
        "mine, estimated at 4 bytes a token:",
        "  web: 75.0% of a run, about 10,000,000 tokens:"
        " 1 epoch in a run of 13,333,333 tokens, 4 in one of 53,333,333",
        "  tiny: 25.0% of a run, about 1,000,000 tokens: 1 epoch in a run of 4,000,000 tokens, 4 in one of 16,000,000",
    ]


def test_a_source_taken_out_leaves_whether_held_out_text_is_compared(tmp_path: Path) -> None:
    held = {"source": "held", "split": "heldout", "files": ["a"], "options": {}}
    kept = {"source": "web", "split": "train", "files": ["b"], "options": {}}
    begun = {"tasks": [held, kept], "finders": 2, "heldout_overlap": 0.5}
    write_json(tmp_path / "plan.json", begun)
    now = _as_begun(tmp_path / "plan.json", {"tasks": [kept], "finders": 1, "heldout_overlap": None})
    assert now == begun | {"tasks": [held | {"files": []}, kept]}
