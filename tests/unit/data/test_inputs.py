"""A source's entries become a list of files, and the list becomes the plan for the data engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle.data.blend import Blend, BlendConfig, HoldOut, SourceConfig, read_blend
from nemo_upcycle.data.inputs import InputFile, folders_of, list_inputs, make_plan, require_disjoint
from nemo_upcycle.errors import UpcycleError


def _blend(folder: Path, **source: object) -> Blend:
    return Blend("mine", folder, BlendConfig({"web": SourceConfig(**source)}))  # type: ignore[arg-type]


def _write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x" * len(name))


def test_patterns_are_relative_to_the_yaml_file_and_sorted(tmp_path: Path) -> None:
    _write(tmp_path, "a/2.txt", "a/1.jsonl.gz", "a/b/3.parquet", "v.txt")
    found = list_inputs(_blend(tmp_path, train=["a/**/*", "a/2.txt"], validation=["v.txt"]), "web", tmp_path)
    listed = [(Path(file.path).name, file.reader, file.size_bytes) for file in found["train"]]
    assert listed == [("1.jsonl.gz", "jsonl", 12), ("2.txt", "text", 7), ("3.parquet", "parquet", 13)]
    assert [file.path for file in found["validation"]] == [str(tmp_path / "v.txt")]
    assert found["heldout"] == []


def test_folders_of_a_blend_hold_its_files_and_no_addresses(tmp_path: Path) -> None:
    _write(tmp_path, "home/mine.yaml", "web/one.txt", "books/a/1.txt")
    home = tmp_path / "home"
    train = [f"{tmp_path}/web/one.txt", f"{tmp_path}/books/*/[0-9].txt", "hf://datasets/a/b.parquet"]
    found = folders_of(_blend(home, train=train, heldout=["here/*.txt"]))
    assert found == [home, tmp_path / "web", tmp_path / "books", home / "here"]
    assert folders_of(_blend(home, reader="redpajama_v2", train=[str(tmp_path / "web")])) == [home, tmp_path / "web"]
    own = _blend(home, reader="lm_eval", train=["mmlu"], options={"include_path": "own"})
    assert folders_of(own) == [home, home / "own"]
    assert folders_of(read_blend("sotu")) == []
    _write(tmp_path, "asked/tasks/own.yaml")
    (tmp_path / "asked/suite.yaml").write_text("{tasks: {own: [0]}, local: false, include_path: tasks}")
    blend = _blend(home, train=["here/*.txt"])
    blend.config.decontaminate = ["full", str(tmp_path / "asked/suite.yaml")]
    assert folders_of(blend) == [home, home / "here", tmp_path / "asked", tmp_path / "asked/tasks"]


def test_links_are_files(tmp_path: Path) -> None:
    """The hub's cache consists of links."""
    _write(tmp_path, "blobs/abc.txt", "web/1.txt")
    (tmp_path / "web/2.txt").symlink_to(tmp_path / "blobs/abc.txt")
    (tmp_path / "web/gone.txt").symlink_to(tmp_path / "absent.txt")
    found = list_inputs(_blend(tmp_path, train=["web/*.txt"]), "web", tmp_path)["train"]
    assert [(Path(file.path).name, file.size_bytes) for file in found] == [("1.txt", 9), ("2.txt", 13)]


def test_no_file_is_read_twice(tmp_path: Path) -> None:
    _write(tmp_path, "a.txt", "b.txt")
    inputs = {"web": list_inputs(_blend(tmp_path, train=["*.txt"], heldout=["a.txt"]), "web", tmp_path)}
    with pytest.raises(UpcycleError, match=r"a\.txt is in both web\.train and web\.heldout"):
        require_disjoint(inputs)
    one, two = (list_inputs(_blend(tmp_path, train=[entry]), "web", tmp_path) for entry in ("*.txt", "b.txt"))
    require_disjoint({"one": one})
    with pytest.raises(UpcycleError, match=r"b\.txt is in both one\.train and two\.train"):
        require_disjoint({"one": one, "two": two})


def test_addresses_are_opened_by_fsspec(tmp_path: Path) -> None:
    import fsspec

    with fsspec.open("memory://shelf/one.txt", "w") as handle:
        handle.write("text")
    for entry in ("memory://shelf/*.txt", "memory://shelf/one.txt", f"file://{tmp_path}/*.txt"):
        _write(tmp_path, "two.txt")
        (file,) = list_inputs(_blend(tmp_path, train=[entry]), "web", tmp_path)["train"]
        assert "://" in file.path
        assert file.size_bytes


def _redpajama(train: str = "/rp", **options: object) -> dict[str, Any]:
    return {"train": [train], "reader": "redpajama_v2", "options": options}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"train": ["*.txtt"]}, "Pattern *.txtt matches no file"),
        ({"train": ["*.pdf"]}, "b.pdf has no supported text format"),
        ({"train": ["*.txt"], "reader": "filez"}, "sources.web.reader 'filez' does not exist"),
        ({"train": ["*.txt"], "options": {"text_kei": "t"}}, "option of the reader files 'text_kei' does not exist"),
        ({"train": ["*.txt"], "options": {"text_key": 5}}, "options.text_key is 5; expected the name of a field"),
        ({"train": ["nosuch://x/*.txt"]}, "Address nosuch://x/*.txt cannot be reached (ValueError"),
        ({"train": ["~nobody-here/*.txt"]}, "Address ~nobody-here/*.txt cannot be reached (RuntimeError"),
        ({"train": ["soon"], "reader": "sotu"}, "years is 'soon'; expected 2007 or"),
        (_redpajama(), "options.snapshots is missing"),
        (_redpajama(snapshots="2023-14"), "options.snapshots is 2023-14; expected a list"),
        (_redpajama(snapshots=["2023-14"], shards=-1), "options.shards is -1; expected a whole number, 1 or more"),
        (_redpajama(snapshots=["2023-14"], buckets=["heads"]), "options.buckets 'heads' does not exist"),
        (_redpajama("rp", snapshots=["2023-14"], shards=1), "/rp has no folder `documents`"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, source: dict[str, Any], said: str) -> None:
    _write(tmp_path, "a.txt", "b.pdf")
    with pytest.raises(UpcycleError) as caught:
        list_inputs(_blend(tmp_path, **source), "web", tmp_path)
    assert said in str(caught.value)


def test_shards_of_redpajama_are_sampled_with_the_seed(tmp_path: Path) -> None:
    options = {"snapshots": ["2023-06", "2023-14"], "shards": 5}
    blend = _blend(tmp_path, **_redpajama("https://host/v1/", **options))
    found, again = (list_inputs(blend, "web", tmp_path) for _ in range(2))
    assert found == again
    paths = [file.path for file in found["train"]]
    assert len(set(paths)) == 5
    assert all(re.fullmatch(r"https://host/v1/documents/2023-.*/en_head\.json\.gz", path) for path in paths)
    listed = paths[0].replace("/documents/", "/duplicates/").replace(".json.gz", ".duplicates.parquet")
    assert found["train"][0].options == {"bucket": ["head"], "duplicates": listed}


TOKENIZER = {"eos_id": 0, "vocab_size": 100}


def _files(*names: str) -> list[InputFile]:
    return [InputFile(f"/{name}", "text", 10) for name in names]


def test_held_out_files_come_before_those_to_train_on(tmp_path: Path) -> None:
    """The engine keeps the first of two equal texts, so training files must not come before held-out files."""
    sources = {"web": SourceConfig(train=["x"]), "books": SourceConfig(train=["x"])}
    inputs = {
        "web": {"train": _files("a"), "validation": [], "heldout": []},
        "books": {"train": _files("b"), "validation": _files("c"), "heldout": _files("d")},
    }
    tasks = make_plan(Blend("mine", tmp_path, BlendConfig(sources)), inputs, tmp_path, TOKENIZER)["tasks"]
    assert [(task["files"], task["split"]) for task in tasks] == [
        (["/d"], "heldout"),
        (["/c"], "validation"),
        (["/a"], None),  # spread over all splits, because no split has files of its own
        (["/b"], "train"),
    ]


def test_searches_for_held_out_text_if_there_is_some(tmp_path: Path) -> None:
    """Without held-out text, the search is skipped, because it reads all texts once more."""
    inputs = {"web": {"train": _files("a"), "validation": [], "heldout": []}}

    def plan(**shares: float) -> dict[str, Any]:
        config = BlendConfig({"web": SourceConfig(train=["x"])}, hold_out=HoldOut(**shares))
        return make_plan(Blend("mine", tmp_path, config), inputs, tmp_path, TOKENIZER)

    assert plan()["heldout_overlap"] == 0.5
    assert plan(validation=0, heldout=0)["heldout_overlap"] is None
    inputs["web"]["heldout"] = _files("b")
    assert plan(validation=0, heldout=0)["heldout_overlap"] == 0.5
