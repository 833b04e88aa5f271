"""A stand-in for the Hugging Face hub: serves models and other files to the hub's own client."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar


COMMIT = "c" * 40
TOKEN = "hf_" + "a" * 34


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """Serve the subfolders of `root` while the block runs, and yield the URL to set as HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(ModelHub, root))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


class ModelHub(BaseHTTPRequestHandler):
    """Serves the folders ORG/NAME below a root folder, as the hub serves repositories."""

    def __init__(self, root: Path, *given: object) -> None:
        self.root = root
        super().__init__(*given)

    #: Paths requested so far, and suffixes of paths. The server answers a path only after its suffix was removed here.
    asked: ClassVar[list[str]] = []
    held: ClassVar[set[str]] = set()

    def do_HEAD(self) -> None:
        self.asked.append(self.path)
        name, _, file = self.path.lstrip("/").partition(f"/resolve/{COMMIT}/")
        if self._is_refused():
            return
        path = self.root / name / file
        if self.path.startswith("/api/models/") or not file or not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            self._answer(200, path.read_bytes(), {"ETag": f'"{path.stat().st_size:040x}"', "X-Repo-Commit": COMMIT})

    def do_GET(self) -> None:
        self.asked.append(self.path)
        while self.path.endswith(tuple(self.held)):
            time.sleep(0.01)
        if not self.path.startswith("/api/models/"):
            self.do_HEAD()
            return
        if self._is_refused():
            return
        name = self.path.removeprefix("/api/models/").partition("/revision/")[0]
        if not (self.root / name).is_dir():
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        files = [path.relative_to(self.root / name).as_posix() for path in (self.root / name).rglob("*.*")]
        info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _is_refused(self) -> bool:
        """Refuse a gated model if the token is missing (401) or has no access (403); return whether it is refused."""
        token = self.headers.get("Authorization")
        if "acme/gated" not in self.path or token == f"Bearer {TOKEN}":
            return False
        self._answer(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
        return True

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...
