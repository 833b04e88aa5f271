"""Files on servers: temporary errors are retried, and permanent errors are not blamed on the file."""

from __future__ import annotations

import gzip
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from xxhash import xxh3_128

from nemo_upcycle.data.engine import lines
from nemo_upcycle.errors import UpcycleError
from tests.data_engine.blend import jsonl, sentence, write_plan
from tests.data_engine.runs import execute, removed, run, stats, texts


MANY = [f"{sentence(n)} {sha256(str(n).encode()).hexdigest()}" for n in range(4000)]


class Server(ThreadingHTTPServer):
    """Serves a folder. A file's name says which mistake the server makes."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: Counter[tuple[str, str | None]] = Counter()

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        file, place = self.server.folder / self.path.lstrip("/"), self.headers.get("Range")
        self.server.asked[self.path, place] += self.command == "GET"
        fails = self.command == "GET" and self.server.asked[self.path, place] == 1
        if status := self._status(file, fails=fails):
            self.send_error(status)
            return
        content = file.read_bytes()
        self.close_connection = True
        self.send_response(HTTPStatus.PARTIAL_CONTENT if place else HTTPStatus.OK)
        if place:
            start, _, end = place.removeprefix("bytes=").partition("-")
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
            content = content[int(start) : int(end) + 1]
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[: len(content) // 2] if "cut" in self.path and fails else content)

    do_HEAD = do_GET

    def _status(self, file: Path, *, fails: bool) -> HTTPStatus | None:
        if "forbidden" in self.path:
            return HTTPStatus.FORBIDDEN
        if "refused" in self.path:
            return HTTPStatus.INTERNAL_SERVER_ERROR
        if not file.is_file():
            return HTTPStatus.NOT_FOUND
        return HTTPStatus.SERVICE_UNAVAILABLE if "passing" in self.path and fails else None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    with Server(folder) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_WAITS_S", (0.01, 0.01))


def test_files_of_a_server(tmp_path: Path, server: Server) -> None:
    (server.folder / "some.jsonl.gz").write_bytes(gzip.compress(jsonl("one", "two") + b"{\n" + jsonl("three")))
    files = [server.address("some.jsonl.gz"), server.address("gone.jsonl")]
    work = execute(write_plan(tmp_path, [{"files": files}]))
    assert texts(work) == ["one", "two", "three"]
    lost = [(line["reason"], line["where"]) for line in removed(work)]
    assert lost == [("broken JSON", f"{files[0]}:3"), ("missing file", f"{files[1]}:0")]
    size_bytes = (server.folder / "some.jsonl.gz").stat().st_size
    digest = xxh3_128(b"one\0two\0three\0").hexdigest()
    assert stats(work)["files"] == {files[0]: {"bytes": size_bytes, "whole": True, "texts_xxh3_128": digest}}


@pytest.mark.parametrize("name", ["passing.jsonl", "cut.jsonl", "cut.jsonl.gz", "passing.parquet"])
def test_passing_error_costs_nothing(tmp_path: Path, server: Server, name: str) -> None:
    file, reader = server.folder / name, name.rpartition(".")[2].replace("gz", "jsonl")
    if reader == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": MANY}), file)
    else:
        file.write_bytes(gzip.compress(jsonl(*MANY)) if name.endswith("gz") else jsonl(*MANY))
    plan = write_plan(tmp_path, [{"files": [server.address(name)], "reader": reader}])
    done = run(plan)
    assert done.returncode == 0, done.stderr
    assert max(server.asked.values()) > 1
    assert texts(plan.parent) == MANY
    assert removed(plan.parent) == []


@pytest.mark.parametrize("name", ["refused.jsonl", "forbidden.jsonl", "forbidden.parquet", "unanswered.jsonl"])
@pytest.mark.usefixtures("impatient")
def test_what_does_not_pass_is_no_missing_file(tmp_path: Path, server: Server, name: str) -> None:
    file = "http://127.0.0.1:9/some.jsonl" if name == "unanswered.jsonl" else server.address(name)
    plan = write_plan(tmp_path, [{"files": [file], "reader": name.rpartition(".")[2]}])
    with pytest.raises(UpcycleError, match=f"{file} cannot be read: (500|403|Cannot connect).*resumes the build"):
        execute(plan)


@pytest.mark.usefixtures("impatient")
def test_file_that_is_taken_away_while_it_is_read(tmp_path: Path, server: Server) -> None:
    file = server.folder / "cut.jsonl"
    file.write_bytes(jsonl(*MANY))
    with lines.open_input(server.address(file.name)) as handle:
        file.unlink()
        with pytest.raises(UpcycleError, match=r"cut.jsonl cannot be read: .*resumes the build"):
            shutil.copyfileobj(handle, BytesIO())


def test_local_file_that_cannot_be_read_now(tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    file.symlink_to(file)  # a loop, which the file system refuses to follow
    plan = write_plan(tmp_path, [{"files": [str(file)]}])
    stopped = run(plan)
    assert (stopped.returncode, stopped.stderr.count("\n")) == (2, 1)
    assert "Too many levels of symbolic links" in stopped.stderr
    file.unlink()
    file.write_bytes(jsonl("there"))
    assert run(plan).returncode == 0
    assert texts(plan.parent) == ["there"]
