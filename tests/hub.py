"""A stand-in for the Hugging Face hub: serves small data sets over HTTP, or answers with HTTP errors.

The server implements the part of the hub's protocol that `datasets` and fsspec's `hf://` use. `SETS` has a data set
for every task of the paper's suite and of the blends. Each data set has the columns that lm-eval's task reads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote


#: Data set -> path of a file -> content of the file. `NAME@refs/convert/parquet` is the Parquet form of a data set.
Repositories = dict[str, dict[str, bytes]]
_WORDS = ("amber", "brook", "cedar", "delta", "ember", "flint", "grove", "haven", "inlet", "jetty", "knoll", "larch")


def _sentence(*seed: object, words: int = 14) -> str:
    """Return words that are unique to a seed, so that no two questions share an n-gram."""
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return " ".join(f"{_WORDS[byte % len(_WORDS)]}{byte}" for byte in digest[:words])


def _row(kind: str, split: str, number: int) -> dict[str, Any]:
    """Return a row with the columns of all kinds of data sets.

    If several kinds have the same column, the value has the form that `kind` needs.
    """
    text = _sentence(kind, split, number)
    four = [f"answer {letter} of {number}" for letter in "abcd"]
    listed = {"text": [*four, "none"], "label": list("ABCDE")}
    no_date = {"day": "", "month": "", "year": ""}
    texts = ("question", "text", "passage", "context", "goal", "question_stem", "ctx_a")
    row: dict[str, Any] = {
        **dict.fromkeys(texts, text),
        **dict.fromkeys(("choices", "options", "endings"), four),
        **dict.fromkeys(("answer", "cop"), number % 4),
        **dict.fromkeys(("label", "idx", "correct_option"), number % 2),
        **{f"mc{n}_targets": {"choices": four, "labels": [1, 0, 0, 0]} for n in (1, 2)},
        **dict(zip(("opa", "opb", "opc", "opd"), four, strict=True)),
        **dict(zip(("sol1", "sol2", "option1", "option2"), four, strict=True)),
        "correct_answer": four[3],
        **{f"distractor{n}": four[n] for n in (1, 2, 3)},
        "id": f"{split}/{number}",
        "query_id": f"{split}-{number}",
        "subject": "some",
        "support": _sentence("support", split, number),
        "query": f"What follows from {number}?",
        "answerKey": "B",
        "ctx_b": "she",
        "activity_label": "Rowing",
        "sentence": f"{text} because _ was late.",
    }
    own: dict[str, dict[str, Any]] = {
        **{one: {"choices": listed} for one in ("openbookqa", "arc", "commonsense_qa")},
        "hellaswag": {"label": "1"},
        "winogrande": {"answer": "2"},
        "gsm8k": {"answer": f"It is so. #### {number}"},
        "drop": {
            "answer": {"number": f"{number}", "date": no_date, "spans": ["x"]},
            "validated_answers": {"number": ["2"], "date": [no_date], "spans": [["x"]]},
        },
        "text": {"text": " ".join(_sentence(split, number, n) for n in range(12))},
    }
    return row | own.get(kind, {})


_ALL, _NO_TEST = ("train", "validation", "test"), ("train", "validation")


def _subjects() -> tuple[str, ...]:
    """Return the MMLU subjects for which lm-eval has task files."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    files = (Path(spec.submodule_search_locations[0]) / "tasks/mmlu/default").glob("mmlu_*.yaml")
    return tuple(sorted(file.stem.removeprefix("mmlu_") for file in files))


#: Data set of the paper's suite or of a blend -> kind of row, names of configurations, names of splits. A data set
#: without names of configurations has one unnamed configuration.
SETS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "cais/mmlu": ("mmlu", _subjects(), ("dev", "validation", "test")),
    "truthfulqa/truthful_qa": ("truthfulqa", ("multiple_choice",), ("validation",)),
    "baber/piqa": ("piqa", (), _NO_TEST),
    "allenai/sciq": ("sciq", (), _ALL),
    "aps/super_glue": ("boolq", ("boolq",), _NO_TEST),
    "allenai/openbookqa": ("openbookqa", ("main",), _ALL),
    "allenai/ai2_arc": ("arc", ("ARC-Easy", "ARC-Challenge"), _ALL),
    "Rowan/hellaswag": ("hellaswag", (), _NO_TEST),
    "allenai/winogrande": ("winogrande", ("winogrande_xl",), _NO_TEST),
    "tau/commonsense_qa": ("commonsense_qa", (), _NO_TEST),
    "openai/gsm8k": ("gsm8k", ("main",), ("train", "test")),
    "EleutherAI/drop": ("drop", (), _NO_TEST),
    "openlifescienceai/medmcqa": ("medmcqa", (), _NO_TEST),
}
#: Repository of another source of a blend -> folder of the source's JSON lines.
TEXTS = {
    "allenai/dolmino-mix-1124": "data/flan/",
    **{
        f"common-pile/{name}_filtered": ""
        for name in ("data_provenance_initiative", "libretexts", "pressbooks", "oercommons", "arxiv_abstracts")
    },
}
#: Number of rows in a training split and in any other split. Tasks draw up to 25 examples from a training split.
TRAINED, ROWS = 26, 6


def repositories() -> Repositories:
    """Return all data sets of the hub: `SETS`, `TEXTS`, FineWeb-Edu, and LogiQA as a script and as Parquet files."""
    made = {name: _repository(*described) for name, described in SETS.items()}
    for name, folder in TEXTS.items():
        made[name] = {f"{folder}part{n}.jsonl": _lines("text", f"{name}{n}") for n in range(2)}
    made["HuggingFaceFW/fineweb-edu"] = {"sample/100BT/000_00000.parquet": parquet("text", "fineweb")}
    made["EleutherAI/logiqa"] = {"README.md": b"---\nlicense: other\n---\n", "logiqa.py": b"raise SystemExit(1)\n"}
    made["lucasmccabe/logiqa"] = {"README.md": b"---\nlanguage: en\n---\n", "logiqa.py": b"raise SystemExit(1)\n"}
    made["lucasmccabe/logiqa@refs/convert/parquet"] = {
        f"default/{split}/0000.parquet": parquet("logiqa", split) for split in _ALL
    }
    return made


def rows(kind: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of a split, for a kind of data set."""
    return [_row(kind, split, number) for number in range(TRAINED if split.endswith("train") else ROWS)]


def _repository(kind: str, configs: tuple[str, ...], splits: tuple[str, ...]) -> dict[str, bytes]:
    """Return the files of a data set: JSON lines, and a card that lists the files by configuration and split."""
    files, card = {}, []
    for config in configs or ("default",):
        named = []
        for split in splits:
            path = f"{config}/{split}.jsonl"
            files[path] = _lines(kind, f"{config}.{split}" if configs else split)
            named.append({"split": split, "path": path})
        card.append({"config_name": config, "data_files": named})
    return files | {"README.md": f"---\n{json.dumps({'configs': card})}\n---\n".encode()}


def _lines(kind: str, split: str) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows(kind, split)).encode()


def parquet(kind: str, split: str) -> bytes:
    """Return a Parquet file of rows."""
    import pyarrow
    import pyarrow.parquet

    handle = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(kind, split)), handle)
    return handle.getvalue()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        self.server.asked.append(f"{self.command} {unquote(path)}")
        parts = [unquote(part) for part in path.lstrip("/").split("/")]
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        name = "/".join(parts[1:3])
        if status := self.server.broken.get(name):
            self._send(status, b"{}", {"X-Error-Code": "GatedRepo"} if status < 500 else {})
        elif parts[0] != "datasets" or name not in self.server.repositories:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif is_api:
            kind, revision, *below = parts[3:] or ["revision", "main"]
            self._send_revision(kind, name, revision, "/".join(below), parse_qs(query), body)
        else:
            self._send_revision("file", name, parts[4], "/".join(parts[5:]), {}, body)

    do_HEAD = do_POST = do_GET

    def _found(self, name: str, revision: str) -> tuple[dict[str, bytes] | None, str]:
        """Return the files and the commit of a data set's revision; the files are None if the revision is missing."""
        for key, files in self.server.repositories.items():
            repository, _, branch = key.partition("@")
            if repository == name and revision in (branch or "main", commit(key)):
                return files, commit(key)
        return None, ""

    def _send_revision(
        self, kind: str, name: str, revision: str, path: str, query: dict[str, list[str]], body: bytes
    ) -> None:
        files, sha = self._found(name, revision)
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "file" and path in files:
            etag = hashlib.sha1(files[path]).hexdigest()
            self._send(200, files[path], {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        elif kind == "file":
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        elif kind == "revision":
            self._send_json({"id": name, "sha": sha, "siblings": [{"rfilename": path} for path in files], "tags": []})
        elif kind == "tree":
            self._send_json(_tree(files, path, recursive=query.get("recursive", [""])[0].lower() == "true"))
        else:  # paths-info
            is_json = "json" in self.headers.get("Content-Type", "")
            wanted = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
            every = {entry["path"]: entry for entry in _tree(files, "", recursive=True)}
            self._send_json([every[path] for path in wanted if path in every])

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def _tree(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """Return the entries of a folder in the hub's form."""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if folder and not path.startswith(f"{folder}/"):
            continue
        below = path.removeprefix(f"{folder}/" if folder else "").split("/")
        steps = range(1, len(below) + 1) if recursive else (1,)
        for depth in steps:
            name = "/".join(([folder] if folder else []) + below[:depth])
            is_file = name == path
            oid = hashlib.sha1(content if is_file else name.encode()).hexdigest()
            entries[name] = {"type": "file" if is_file else "directory", "path": name, "oid": oid}
            entries[name]["size"] = len(content) if is_file else 0
    return list(entries.values())


def commit(key: str) -> str:
    """Return the commit hash of a repository's branch."""
    return hashlib.sha1(key.encode()).hexdigest()


class StandIn(ThreadingHTTPServer):
    """A server that stands in for the hub.

    Args:
        content: data sets to serve.

    Attributes:
        repositories: data sets that are served.
        broken: data set -> HTTP error with which the server answers every request for the data set.
        asked: requests received so far.
    """

    daemon_threads = True

    def __init__(self, content: Repositories) -> None:
        self.repositories = content
        self.broken: dict[str, int] = {}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def endpoint(self) -> str:
        """URL to set as HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(content: Repositories) -> Iterator[StandIn]:
    """Serve data sets while the block runs."""
    server = StandIn(content)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
