"""The engine recognizes a file's format and encoding from its bytes, whatever the file's name says."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from nemo_upcycle.data.engine.encodings import decode
from tests.data_engine.runs import outcome, stats


GOOD = [
    "Der Müller fährt über die Brücke.",
    "L\u2019été à Nîmes: « déjà » passé — 20 €",
    "plain words",
    "naïve façade",
]
LONG = [f"{number}: {text}" for number in range(400) for text in GOOD]
_SIGNS = random.Random(7).choices([chr(n) for n in range(0x4E00, 0x9FA6)], k=1200)
CHINESE = "".join(sign + ("。\n" if n % 40 == 39 else "") for n, sign in enumerate(_SIGNS))
RUSSIAN = "Однажды утром старик вышел к реке и сел на камень.\n" * 40


def _lines(many: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in many)


def _parquet(content: bytes) -> bytes:
    stored = BytesIO()
    rows = [json.loads(line)["text"] for line in content.splitlines()]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), stored)
    return stored.getvalue()


def _skippable(content: bytes) -> bytes:
    """Return the content as pzstd writes it: a frame to skip, then two frames of content."""
    frames = [zstandard.compress(part) for part in (content[:999], content[999:])]
    return b"\x50\x2a\x4d\x18\x04\0\0\0size" + b"".join(frames)


STORED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "zstandard": zstandard.compress,
    "pzstd": _skippable,
    "bzip2": lambda content: bz2.compress(content[:999]) + bz2.compress(content[999:]),
    "xz": lambda content: lzma.compress(content[:999]) + b"\0" * 8 + lzma.compress(content[999:]),
    "parquet": _parquet,
}


def _read(folder: Path, name: str, content: bytes, reader: str) -> tuple[list[str], list[tuple[str, int]]]:
    """Return the texts of a file, and the reason and line of every loss."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return outcome(folder, folder / name, reader=reader)


@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz", "some.parquet"])
@pytest.mark.parametrize("kind", STORED)
def test_compression_is_told_by_the_bytes(tmp_path: Path, kind: str, name: str) -> None:
    reader = "parquet" if name.endswith("parquet") else "jsonl"
    assert _read(tmp_path, name, STORED[kind](_lines(LONG).encode()), reader) == (LONG, [])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_encoding_is_told_by_the_bytes(tmp_path: Path, encoding: str, compress: Callable[[bytes], bytes]) -> None:
    stored = compress(_lines(LONG).encode(encoding))
    assert _read(tmp_path / "lines", "some.jsonl", stored, "jsonl") == (LONG, [])
    text = "\r\n".join(LONG)
    assert _read(tmp_path / "text", "some.txt", compress(text.encode(encoding)), "text") == ([text], [])


@pytest.mark.parametrize(
    ("text", "encoding"),
    [(RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (CHINESE, "gb18030"), ("さくらの花が、咲いた。", "sjis")],
)
def test_other_encodings_are_not_taken_for_latin1(text: str, encoding: str) -> None:
    with pytest.raises(UnicodeDecodeError):
        decode(text.encode(encoding, errors="replace"))


def test_what_is_no_text_is_one_line_of_the_list(tmp_path: Path) -> None:
    noise = random.Random(5).randbytes(100_000)
    assert _read(tmp_path / "noise", "some.jsonl", noise, "jsonl") == ([], [("not text", 1)])
    assert _read(tmp_path / "text", "some.txt", noise, "text") == ([], [("not text", 1)])
    with zipfile.ZipFile(stored := BytesIO(), "w") as archive:
        archive.writestr("some.jsonl", _lines(LONG))
    archived = _read(tmp_path / "archive", "some.jsonl", stored.getvalue(), "jsonl")
    assert archived == ([], [("zip archive, to be unpacked", 1)])


def test_few_nuls_are_taken_out_and_many_end_the_document(tmp_path: Path) -> None:
    of_a_terminal = "\x1b[1mNAME\x1b[0m\n\tN\bNA\bAM\bME\bE - a page"
    many = ["word " * 100 + "\0end", "word " * 1000 + "\0" * 5000, of_a_terminal]
    kept, lost = _read(tmp_path, "some.jsonl", _lines(many).encode(), "jsonl")
    assert kept == ["word " * 100 + "end", of_a_terminal]
    assert lost == [("NULs", 1), ("not text", 2)]
    counts = stats(tmp_path / "work")["steps"]["read"]
    assert counts == {"in": 3, "kept": 2, "removed": {"not text": 1}}


def test_big_file_is_not_held_in_memory(tmp_path: Path) -> None:
    import tracemalloc

    from nemo_upcycle.data.engine.lines import read_lines

    many = [f"{GOOD[0]} {random.Random(n).randbytes(300).hex()}" for n in range(30_000)]
    for encoding, store in (("utf-8", bytes), ("utf-16", bytes), ("utf-8", bz2.compress)):
        file = tmp_path / "big"
        file.write_bytes(store(_lines(many).encode(encoding)))
        tracemalloc.start()
        count = sum(1 for _ in read_lines(str(file)))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == len(many)
        assert peak_bytes < 5e6, store  # the file has 19 MB, and twice as many in UTF-16
