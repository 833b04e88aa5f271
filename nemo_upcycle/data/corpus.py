"""Read texts as documents, in three splits that share nothing: train, validation and heldout."""

from __future__ import annotations

import csv
import glob
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nemo_upcycle.data.assets import fetch_asset
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import read_conf
from nemo_upcycle.utils.files import read_json_lines, read_text


SPLITS = ("train", "validation", "heldout")


class Document(NamedTuple):
    """One text.

    Attributes:
        id: its source, unique within a corpus: a speech's id, a path, or `path:line`.
        text: the whole text.
    """

    id: str
    text: str


Documents = dict[str, list[Document]]


def load_corpus(config: str | Path) -> Documents:
    """Read a corpus as its configuration says.

    Args:
        config: the name of a file of `conf/data` (`sotu`), or the path of a YAML file like those.

    Returns:
        The documents of each split, by the names in `SPLITS`, in a fixed order.

    Raises:
        UpcycleError: an unknown name or key, a pattern that matches no file, an empty split, or two splits that share
            a year, a file or a text.

    Example:
        >>> [len(documents) for documents in load_corpus("sotu").values()]  # doctest: +SKIP
        [64, 3, 14]
    """
    key, read, found = _selected(config)
    documents = read(found)
    _check(documents, key)
    return documents


def check_corpus(config: str | Path) -> None:
    """Check a corpus without reading its texts: every pattern matches files, and no two splits share one.

    Args:
        config: as in `load_corpus`.

    Raises:
        UpcycleError: as in `load_corpus`, except for mistakes in the texts themselves.
    """
    _selected(config)


def _selected(config: str | Path) -> tuple[str, Callable[[Any], Documents], dict[str, list[Any]]]:
    """Return the key of a corpus, the reader of its documents, and what to read for each split."""
    settings, _, folder = read_conf("data", config, "corpus configuration")
    corpus = str(settings.get("corpus"))
    if corpus not in _READERS:
        raise UpcycleError.unknown("corpus", corpus, _READERS)
    key, expand, read = _READERS[corpus]
    for name in settings:
        if name not in ("corpus", key):
            raise UpcycleError.unknown(f"key of a {corpus} corpus", str(name), ["corpus", key])
    selections = settings.get(key) or {}
    if not isinstance(selections, Mapping):
        raise UpcycleError(f"`{key}` of the corpus", got=selections, expected="splits", fix="see conf/data")
    for name in selections:
        if name not in SPLITS:
            raise UpcycleError.unknown("split", str(name), SPLITS)
    wanted = {split: _entries(selections, split, key) for split in SPLITS}
    found = {split: [one for entry in entries for one in expand(entry, folder)] for split, entries in wanted.items()}
    _disjoint(found, key)
    return key, read, found


def _entries(selections: Mapping[Any, Any], split: str, key: str) -> list[Any]:
    entries = selections.get(split)
    if not entries:
        raise UpcycleError(f"split {split}", got="no documents", expected="at least one", fix=f"widen {key}.{split}")
    if not isinstance(entries, list):
        raise UpcycleError(
            f"{key}.{split} of the corpus", got=entries, expected="a list", fix="write a list, as in conf/data"
        )
    return entries


def _check(documents: Documents, key: str) -> None:
    """Raise if a split is empty or two splits share a text."""
    seen: dict[str, tuple[str, str]] = {}
    for split, members in documents.items():
        if not members:
            raise UpcycleError(
                f"split {split}", got="no documents", expected="at least one", fix=f"widen {key}.{split}"
            )
        for document in members:
            digest = hashlib.sha256(document.text.strip().encode()).hexdigest()
            other_split, other_id = seen.setdefault(digest, (split, document.id))
            if other_split != split:
                _refuse_overlap(f"text of {document.id}", f"{split} and (as {other_id}) {other_split}", key)


def _refuse_overlap(what: str, where: str, key: str) -> None:
    raise UpcycleError(
        what,
        got=f"in {where}",
        expected="in one split",
        fix=f"remove it from one of them in `{key}`: evaluation data must not be trained on",
    )


def _disjoint(members: dict[str, list[Any]], key: str) -> None:
    """Raise if a member, a year or a file, is in two splits."""
    owner: dict[Any, str] = {}
    for split, values in members.items():
        for value in values:
            if owner.setdefault(value, split) != split:
                _refuse_overlap(f"{key.removesuffix('s')} {value}", f"{owner[value]} and {split}", key)


def _years(entry: object, folder: Path) -> range:
    """Return the years of `2007` or `1946-2005`."""
    first, _, last = str(entry).partition("-")
    try:
        years = range(int(first), int(last or first) + 1)
    except ValueError:
        years = range(0)
    if not years:
        raise UpcycleError(
            "years of a split", got=repr(entry), expected="2007 or '1946-2005'", fix="correct the entry"
        )
    return years


def _read_sotu(years: dict[str, list[int]]) -> Documents:
    folder = fetch_asset("sotu")
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["is_sotu"] == "True"]
    return {
        split: [
            Document(row["fileid"], read_text(folder / "speeches" / f"{row['fileid']}.txt").strip())
            for row in rows
            if int(row["year"]) in wanted
        ]
        for split, wanted in years.items()
    }


def _read_text(files: dict[str, list[Path]]) -> Documents:
    return {
        split: [document for file in dict.fromkeys(members) for document in _documents(file)]
        for split, members in files.items()
    }


def _matches(pattern: object, folder: Path) -> list[Path]:
    """Return the files that a pattern matches."""
    whole = folder / Path(str(pattern)).expanduser()
    files = [path for name in sorted(glob.glob(str(whole), recursive=True)) if (path := Path(name)).is_file()]
    if not files:
        raise UpcycleError(
            f"pattern {whole}",
            got="no file",
            expected="at least one",
            fix="check it; a relative pattern starts from the folder of the YAML file",
        )
    for file in files:
        if file.suffix not in (".txt", ".jsonl"):
            raise UpcycleError(f"file {file}", got=file.suffix, expected=".txt or .jsonl", fix="narrow the pattern")
    return [file.resolve() for file in files]


def _documents(file: Path) -> Iterator[Document]:
    if file.suffix == ".txt":
        texts = {str(file): read_text(file)}
    else:
        texts = {where: _text_of(line, where) for where, line in read_json_lines(file)}
    yield from (Document(name, text) for name, text in texts.items() if text.strip())


def _text_of(line: dict[str, Any], where: str) -> str:
    if "text" not in line:
        raise UpcycleError(where, got=f"keys {sorted(line)}", expected='{"text": "..."}', fix="correct the line")
    return str(line["text"])


#: Corpus -> its key; the function that turns an entry into years or files, relative to a folder; the reader.
_READERS: dict[str, tuple[str, Callable[[Any, Path], Iterable[Any]], Callable[[Any], Documents]]] = {
    "sotu": ("years", _years, _read_sotu),
    "text": ("files", _matches, _read_text),
}
