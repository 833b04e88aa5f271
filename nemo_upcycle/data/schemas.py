"""Find the text field of each file, and make one source of all files with the same text field."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_upcycle.data.blend import Blend, is_pattern
from nemo_upcycle.data.engine.encodings import COMPRESSED
from nemo_upcycle.data.engine.lines import is_address
from nemo_upcycle.data.first_look import ask_engine, the_long_one
from nemo_upcycle.data.readers import InputFile, suffix_of
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import size_text


#: Field that holds the text, unless a source names another field.
TEXT = "text"
#: Maximum number of files to open; with more, only every n-th file is opened.
_OPENED = 400
#: Estimated bytes of text for each stored byte of a compressed file or Parquet file.
PACKED = 2.5
#: Maximum number of fields that a message names, and maximum number of characters that a field contributes to the name
#: of a source.
_NAMED, _LONGEST = 4, 24


@dataclass(frozen=True)
class Schema:
    """The text fields in the first records of a file.

    Attributes:
        file: file to which the schema belongs.
        records: number of records read.
        fields: name of a field -> number of records with text in this field, and number of characters of this text;
            None if the file is one text.
        rows: number of all records; None if the file does not state it.
    """

    file: InputFile
    records: int
    fields: Mapping[str, Sequence[int]] | None
    rows: int | None = None

    @property
    def field(self) -> str:
        """The field that holds the text: `text`, or the only long field if most records lack `text`."""
        if self.fields is None or 2 * self._having(TEXT) >= self.records:
            return TEXT
        return the_long_one({name: length for name, (_, length) in self.fields.items()}) or TEXT

    def _having(self, field: str) -> int:
        return self.fields[field][0] if self.fields and field in self.fields else 0

    def kept(self, field: str) -> float:
        """Return the share of the records that have text in a field, 0 to 1."""
        if self.fields is None:
            return 1.0
        return self._having(field) / self.records if self.records else 0.0

    @property
    def text_bytes(self) -> float:
        """Estimate the bytes of text in the file."""
        length = self.fields[self.field][1] if self.fields and self.field in self.fields else 0
        if self.rows is not None:
            return self.rows * length / max(1, self.records)
        share = length / max(1, sum(one[1] for one in self.fields.values())) if self.fields else 1.0
        return share * (self.file.size_bytes or 0) * (PACKED if self.file.path.endswith(COMPRESSED) else 1.0)


def read_schemas(files: Sequence[InputFile]) -> list[Schema]:
    """Read the first records of files on this machine, in the data environment.

    Args:
        files: files of a source; if there are more than 400, only every n-th file is opened.

    Raises:
        UpcycleError: there is no data environment, or a file cannot be read.
    """
    here = [file for file in files if file.size_bytes and not is_address(file.path)]
    opened = here[:: -(-len(here) // _OPENED)] if here else []
    found = ask_engine({"schemas": [dataclasses.asdict(file) for file in opened]}) if opened else []
    return [Schema(file, **one) for file, one in zip(opened, found, strict=True)]


def split_by_field(blend: Blend, source: str, files: Sequence[InputFile]) -> tuple[Blend, list[Schema]]:
    """Return a blend in which each source reads one field, and the schemas of the files.

    If all files have the same field, they stay one source. Otherwise each field gets a source with the name of the
    field. The weight of the source is the field's share of the bytes, so that every text is read equally often.

    Args:
        blend: blend of texts that were given without a blend.
        source: name of the blend's only source.
        files: files of the source.

    Raises:
        UpcycleError: the fields differ, and there are too many files to open all of them.
    """
    config = blend.config.sources[source]
    if "text_key" in config.options or any(is_address(file.path) for file in files):
        return blend, []
    schemas = read_schemas(files)
    fields = list(dict.fromkeys(schema.field for schema in schemas))
    if len(fields) < 2:
        return (reading(blend, source, fields[0]) if fields != [TEXT] and fields else blend), schemas
    if len(schemas) < sum(1 for file in files if file.size_bytes):
        raise UpcycleError(
            f"Source {source}",
            kind="refused",
            got=f"has more than {_OPENED} files, with texts in {' and '.join(map(repr, fields))}",
            fix="make one source of the blend for each field, with options.text_key",
        )
    stored = {field: sum(one.text_bytes for one in schemas if one.field == field) for field in fields}
    sources, total = dict(blend.config.sources), sum(stored.values())
    del sources[source]
    for field in fields:
        train = _entries(config.train, schemas, field)
        options = config.options | ({} if field == TEXT else {"text_key": field})
        weight = max(1e-4, round(stored[field] / max(1, total), 4))
        name = f"{source}_{re.sub(r'[^a-z0-9]+', '_', field.lower())[:_LONGEST].strip('_') or len(sources)}"
        sources[name] = dataclasses.replace(config, train=train, options=options, weight=weight)
    return dataclasses.replace(blend, config=dataclasses.replace(blend.config, sources=sources)), schemas


def _entries(train: Sequence[str], schemas: Sequence[Schema], field: str) -> list[str]:
    """Return the patterns of the files with a field, or the single files if a pattern also matches other files."""
    entries: list[str] = []
    for end in dict.fromkeys(suffix_of(one.file.path) for one in schemas):
        alike = [one for one in schemas if suffix_of(one.file.path) == end]
        pattern = next((entry for entry in train if entry.endswith(f"/**/*{end}")), "")
        if pattern and all(one.field == field for one in alike):
            entries.append(pattern)
        else:
            entries += [one.file.path for one in alike if one.field == field]
    if found := [entry for entry in entries if is_pattern(entry) and entry not in train]:
        raise UpcycleError(f"File {found[0]}", kind="refused", got="has * ? or [ in its name", fix="rename it")
    return entries


def reading(blend: Blend, source: str, field: str) -> Blend:
    """Return a blend whose source reads its texts from a field."""
    config = blend.config.sources[source]
    changed = dataclasses.replace(config, options=config.options | {"text_key": field})
    return dataclasses.replace(
        blend, config=dataclasses.replace(blend.config, sources=blend.config.sources | {source: changed})
    )


def kept_and_lost(files: Sequence[InputFile], schemas: Sequence[Schema], field: str) -> list[dict[str, Any]]:
    """Group the files of a source by suffix and fields, and estimate the stored bytes that are kept and lost.

    Args:
        files: files of the source.
        schemas: schemas of the opened files.
        field: field that the source reads.
    """
    names = {file.path for file in files}
    schemas = [one for one in schemas if one.file.path in names]
    opened = sum(one.file.size_bytes or 0 for one in schemas)
    scale = sum(file.size_bytes or 0 for file in files) / opened if opened else 1.0
    groups: dict[tuple[str, tuple[str, ...], bool], list[Schema]] = {}
    for one in schemas:
        fields = tuple(one.fields or ())
        groups.setdefault((suffix_of(one.file.path), fields, one.kept(field) > 0), []).append(one)
    rows = []
    for (end, fields, _), alike in groups.items():
        size = round(scale * sum(one.file.size_bytes or 0 for one in alike))
        kept = round(scale * sum((one.file.size_bytes or 0) * one.kept(field) for one in alike))
        count = len(alike) if len(schemas) == len(files) else round(len(alike) * len(files) / len(schemas))
        row = {"files": count, "kind": end, "fields": list(fields), "field": field}
        rows.append(row | {"kept_bytes": kept, "lost_bytes": size - kept, "first": alike[0].file.path})
    return rows


def schema_text(row: Mapping[str, Any]) -> str:
    """Describe a row of `kept_and_lost`.

    Example:
        >>> row = {"files": 1, "kind": ".parquet", "fields": ["body", "url"], "field": "content", "kept_bytes": 0}
        >>> schema_text(row | {"lost_bytes": 100, "first": "/texts/a.parquet"})
        '1 .parquet: no field `content`, but `body`, `url`: 100 bytes LOST (/texts/a.parquet)'
    """
    names = ", ".join(f"`{name}`" for name in row["fields"][:_NAMED]) + ", ..." * (len(row["fields"]) > _NAMED)
    count = f"{row['files']:,} {row['kind']}"
    if not row["kept_bytes"]:
        there = f", but {names}" if names else ""
        return f"{count}: no field `{row['field']}`{there}: {size_text(row['lost_bytes'])} LOST ({row['first']})"
    where = f"texts in `{row['field']}`" if row["fields"] else "each one text"
    lost = f", about {size_text(row['lost_bytes'])} LOST" if row["lost_bytes"] else ", none lost"
    return f"{count}: {where}, {size_text(row['kept_bytes'])} kept{lost}"
