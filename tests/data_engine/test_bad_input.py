"""Bad input is counted and reported with its position, and all good input is kept."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nemo_upcycle.data.engine import lines
from nemo_upcycle.errors import UpcycleError
from tests.data_engine.blend import jsonl, sentence, write_plan
from tests.data_engine.runs import execute, outcome, removed, stats, texts


GOOD = [sentence(n) for n in range(6)]


def _between(bad: bytes) -> bytes:
    """Return two good lines, a bad one, and the other good lines."""
    return jsonl(*GOOD[:2]) + bad + jsonl(*GOOD[2:])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "unfinished\n', "broken JSON"),
        (b'{"text": "half of a pair: \\ud800"}\n', "broken JSON"),
        (b'["no object"]\n', "no JSON object"),
        (b'{"content": "another field"}\n', "no field text"),
        (b'{"text": ["a", "list"]}\n', "text is not a string"),
        ('{"text": "café'.encode() + b'\xc3"}\n', "not UTF-8"),  # half of a character
        (json.dumps({"text": "\0" * 50 + "some words"}).encode() + b"\n", "not text"),
        ('{"text": "1 \ufffd\ufffd\ufffd\ufffd"}\n'.encode(), "not text"),
        ('{"text": "don\xe2\x80\x99t"}\n'.encode(), "not text"),  # UTF-8 read as Latin-1
        ('{"text": "wide"}\n'.encode("utf-16-be"), "broken JSON"),  # ASCII letters with zeros between
        (b"[" * 100_000 + b"\n", "broken JSON"),
    ],
)
def test_bad_line_costs_only_itself(tmp_path: Path, bad: bytes, reason: str) -> None:
    file = tmp_path / "some.jsonl"
    file.write_bytes(_between(bad))
    kept, lost = outcome(tmp_path, file)
    assert kept == GOOD
    assert lost[0] == (reason, 3)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + _between(b""),  # a byte order mark
        _between(b"\n  \n"),
        _between(b"").replace(b"\n", b"\r\n"),
        _between(b"").rstrip(b"\n"),
        _between(b"").replace(b"{", b'{"score": NaN, ', 1),
    ],
)
def test_harmless_oddities_are_read(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "some.jsonl"
    file.write_bytes(content)
    assert outcome(tmp_path, file) == (GOOD, [])


def test_endless_line_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE_BYTES", 1000)
    file = tmp_path / "some.jsonl"
    file.write_bytes(_between(b"x" * 200_000 + b"\n") + b"y" * 200_000)
    assert outcome(tmp_path, file) == (GOOD, [("line too long", 3), ("line too long", 8)])
    lost = stats(tmp_path / "work")["lost"]["line too long"]
    assert lost == {"documents": 2, "bytes": 400_001, "files": 0, "first": f"{file}:3"}


def _zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(content)


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", _zstd)])
def test_damage_costs_what_is_behind_it(tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]) -> None:
    many = [f"{sentence(n)} {sha256(str(n).encode()).hexdigest()}" for n in range(6000)]  # several blocks
    content = jsonl(*many)
    whole = compress(content[:2000]) + compress(content[2000:])  # two gzip members or zstd frames
    for name, stored, least in (("cut", whole[:-1000], 0.9), ("cut_early", whole[: len(whole) // 2], 0.4)):
        file = tmp_path / f"{name}.jsonl.{suffix}"
        file.write_bytes(stored)
        kept, lost = outcome(tmp_path / name, file)
        assert kept == many[: len(kept)]
        assert lost == [("truncated compressed file", len(kept) + 1)]
        counts = stats(tmp_path / name / "work")
        assert counts["lost"]["truncated compressed file"]["bytes"] >= counts["bytes_in"] / 2
        assert len(kept) > len(many) * least
    file = tmp_path / f"damaged.jsonl.{suffix}"
    file.write_bytes(whole[: len(whole) // 2] + b"\0" * 50 + whole[len(whole) // 2 + 50 :])
    work = execute(write_plan(tmp_path / "damaged", [{"files": [str(file)]}]))
    good = int(len(many) * 0.4)
    assert texts(work)[:good] == many[:good]
    counts = stats(work)
    assert counts["steps"]["read"]["removed"]["damaged compressed file"] == 1
    assert 0.65 < counts["bytes_in"] / len(content) < 1.15  # the size of the lost part is estimated


@pytest.mark.parametrize("reader", ["jsonl", "text", "parquet", "redpajama_v2"])
def test_file_that_gives_nothing_costs_only_itself(tmp_path: Path, reader: str) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "empty.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "folder").mkdir()
    (tmp_path / "there.jsonl").write_bytes(_between(b""))
    names = ["gone", "folder", *([] if reader == "parquet" else ["empty", "empty.gz"])]
    files = [str(tmp_path / name) for name in names]
    tasks = [{"files": files, "reader": reader}, {"files": [str(tmp_path / "there.jsonl")]}]
    work = execute(write_plan(tmp_path, tasks))
    lost = [(line["reason"], line["where"].rpartition(":")[0]) for line in removed(work, 0)]
    assert lost == list(zip(["missing file", "unreadable file", *["empty file"] * 2], files, strict=False))
    assert stats(work, 0)["lost"]["missing file"]["files"] == 1
    assert texts(work, 1) == GOOD


def test_fields_without_a_text_are_weighed_by_content(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_bytes(b"".join(json.dumps({"id": "a", "content": text, "n": 1}).encode() + b"\n" for text in GOOD))
    assert outcome(tmp_path, file)[1] == [("no field text", number) for number in range(1, 7)]
    counts = stats(tmp_path / "work")
    assert list(counts["fields"]) == ["content", "id"]
    assert counts["lost"]["no field text"]["bytes"] == counts["bytes_in"] == file.stat().st_size


def test_text_file_loses_only_its_bad_line(tmp_path: Path) -> None:
    file = tmp_path / "some.txt"
    file.write_bytes(b"first\n" + "café".encode()[:-1] + b"\nlast \xc3\xa9")
    assert outcome(tmp_path, file, reader="text") == (["first\ncafÃ\nlast é"], [])
    file.write_bytes(b"first\n" + "привет\n".encode("cp1251") + b"last")
    assert outcome(tmp_path / "cyrillic", file, reader="text") == (["first\nlast"], [("not UTF-8", 2)])


def test_parquet(tmp_path: Path) -> None:
    table = pyarrow.table({"text": [*GOOD[:2], None, *GOOD[2:]], "id": ["same"] * 7})
    file = tmp_path / "some.parquet"
    pyarrow.parquet.write_table(table, file)
    assert outcome(tmp_path / "good", file, reader="parquet") == (GOOD, [("no field text", 3)])
    missing = {"reader": "parquet", "options": {"text_key": "content"}}
    assert outcome(tmp_path / "missing", file, **missing) == ([], [("no field content", 0)])
    counts = stats(tmp_path / "missing" / "work")
    assert counts["lost"]["no field content"]["bytes"] == file.stat().st_size
    assert set(counts["fields"]) == {"text", "id"}
    file.write_bytes(file.read_bytes()[:-20])
    assert outcome(tmp_path / "cut", file, reader="parquet") == ([], [("damaged Parquet file (ArrowInvalid)", 1)])


def test_strict_names_the_place(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.write_bytes(_between(b"{]\n"))
    with pytest.raises(UpcycleError, match=r"some.jsonl:3: broken JSON"):
        execute(write_plan(tmp_path, [{"files": [str(file)]}], strict=True))
