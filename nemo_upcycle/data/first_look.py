"""Read the first documents of a source before a build, to see its fields and whether it holds texts."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.engine.lines import is_address
from nemo_upcycle.data.engine.records import names_inside
from nemo_upcycle.data.environment import ENGINE, data_python
from nemo_upcycle.data.readers import NO_FIELD, READERS, InputFile
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.starting import away_from_here


#: Number of documents to read to check a source.
FIRST = 50
#: Bytes of text after which no further file is opened.
_MOST_BYTES = 4 << 20
#: A field may be the text, too, if it has more than this fraction of the characters of the longest field.
_AS_LONG = 0.25


@dataclass(frozen=True)
class Look:
    """A summary of the first documents of some files.

    Attributes:
        documents: id and bytes of each document.
        lost: reason -> number of records without a text for this reason, and the place of the first such record.
        fields: name of a text field -> number of its characters, longest field first. The characters are counted in
            the first file whose records lack a text.
        read_bytes: bytes read of each opened file; None means the whole file.
        tokens_per_byte: tokens per byte of text; None without a tokenizer.
    """

    documents: Sequence[Sequence[Any]]
    lost: Mapping[str, Sequence[Any]]
    fields: dict[str, int]
    read_bytes: list[int | None]
    tokens_per_byte: float | None

    @property
    def records(self) -> int:
        """Number of records: documents and lost records."""
        return len(self.documents) + sum(count for count, _ in self.lost.values())

    @property
    def is_text(self) -> bool:
        """Whether most records have a text."""
        return 2 * len(self.documents) >= self.records

    @property
    def text_field(self) -> str:
        """The only field that can be the text, if most records lack the expected field; "" otherwise."""
        return "" if self.is_text else the_long_one(self.fields)


def the_long_one(fields: Mapping[str, int]) -> str:
    """Return the field that is much longer than all others, or "" if there is none.

    Args:
        fields: name of a field -> characters of its texts.
    """
    longest = max(fields, key=lambda name: fields[name], default="")
    rivals = [name for name, length in fields.items() if length > _AS_LONG * fields[longest]]
    return longest if rivals == [longest] else ""


def look_at(files: Sequence[InputFile], *, documents: int = FIRST, tokenizer: Path | None = None) -> Look:
    """Read the first documents of files with the engine's readers, in its environment.

    Args:
        files: the files of a source, in their order.
        documents: maximum number of documents to read.
        tokenizer: path of a `tokenizer.json`, to estimate tokens; or None.

    Raises:
        UpcycleError: there is no data environment, or a file cannot be read.
    """
    names = names_inside([file.path for file in files])
    first = [{**dataclasses.asdict(file), "name": names[file.path]} for file in files[: documents + 1]]
    request = {"files": first, "documents": documents, "bytes": _MOST_BYTES, "tokenizer": tokenizer and str(tokenizer)}
    return Look(**ask_engine(request))


def ask_engine(request: Mapping[str, Any]) -> Any:
    """Return the answer of `nemo_upcycle.data.engine.sample`, which runs in the data environment.

    Raises:
        UpcycleError: there is no data environment, or a file cannot be read.
    """
    command = away_from_here([str(data_python()), "-m", f"{ENGINE}.sample"])
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        raise UpcycleError(
            (done.stderr.strip().splitlines() or ["the data engine failed"])[-1].removeprefix("error: ")
        )
    return json.loads(done.stdout)


def filled_files(source: str, files: Sequence[InputFile]) -> list[InputFile]:
    """Return the files on this machine that are not empty.

    Raises:
        UpcycleError: there are files on this machine, and all are empty.
    """
    here = [file for file in files if not is_address(file.path)]
    filled = [file for file in here if file.size_bytes]
    if here and not filled:
        got = "is an empty file" if len(here) == 1 else f"has {len(here):,} files, all empty"
        raise UpcycleError(f"Source {source}", kind="state", got=got, fix=f"give other files than {here[0].path}")
    return filled


def check_texts(blend: Blend, source: str, files: Sequence[InputFile]) -> None:
    """Check that the files of a source on this machine begin with texts.

    Raises:
        UpcycleError: the files are empty, or most of the first documents have no text.
    """
    if filled := filled_files(source, files):
        check_look(blend, source, look_at(filled))


def check_look(blend: Blend, source: str, look: Look) -> None:
    """Check that most of the first documents of a source have a text.

    Raises:
        UpcycleError: most of the documents have no text; the message names the fields of these documents.
    """
    if look.is_text:
        return
    reason, (count, first) = max(look.lost.items(), key=lambda item: item[1][0])
    got, fix = f"{reason} (first at {first})", "correct the files"
    is_named = "text_key" in READERS[blend.config.sources[source].reader].options
    if reason.startswith(NO_FIELD) and is_named and look.fields:
        got = (
            f"{NO_FIELD} `{reason.removeprefix(NO_FIELD).strip()}`; they have "
            f"{', '.join(f'`{name}`' for name in look.fields)}"
        )
        fix = f"set sources.{source}.options.text_key={next(iter(look.fields))}"
    raise UpcycleError(
        f"Source {source}",
        kind="state",
        got=f"cannot be read in {count:,} of its first {look.records:,} documents: {got}",
        fix=fix,
    )
