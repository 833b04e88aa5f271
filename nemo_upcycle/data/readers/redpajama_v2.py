"""RedPajama-V2: a release on a server, or a copy of it, with the publisher's lists of duplicates."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from nemo_upcycle.data.readers import InputFile, Place, Reader, register
from nemo_upcycle.data.readers.jsonl import JsonLines
from nemo_upcycle.errors import UpcycleError


_SHARDS, _LANGUAGES, _BUCKETS = 5000, ("en", "de", "fr", "es", "it"), ("head", "middle")


@register
class RedPajamaV2(Reader):
    """Reader of all document files of some snapshots, or of a sample; an entry is the folder of the release.

    Options: `snapshots` (list), `languages`, `buckets`, `shards` (maximum number of files, chosen with the seed) and
    `duplicates` (whether to omit the rows that the publisher lists as duplicates).
    """

    name = "redpajama_v2"
    options = ("snapshots", "languages", "buckets", "shards", "duplicates")

    def list_files(self, entries: list[str], options: dict[str, Any], at: Place) -> list[InputFile]:
        """See `Reader.list_files`."""
        defaults: dict[str, Any] = {"languages": ["en"], "buckets": ["head"], "duplicates": True}
        options = defaults | options
        for key in ("snapshots", "languages", "buckets"):
            if not isinstance(options.get(key, []), list):
                raise UpcycleError(f"options.{key}", got=options[key], expected="a list", fix=f"write {key}: [NAME]")
        for key, valid in (("languages", _LANGUAGES), ("buckets", _BUCKETS)):
            for name in options[key]:
                if name not in valid:
                    raise UpcycleError.unknown(f"options.{key}", str(name), valid)
        if not options.get("snapshots"):
            raise UpcycleError(
                "options.snapshots", kind="missing", got="is missing", fix='name at least one, such as ["2023-14"]'
            )
        shards = options.get("shards")
        if shards is not None and (not isinstance(shards, int) or shards < 1):
            raise UpcycleError(
                "options.shards", got=shards, expected="a whole number, 1 or more", fix="omit it to read all shards"
            )
        names = [
            f"{snapshot}/{shard:04d}/{language}_{bucket}"
            for snapshot in options["snapshots"]
            for shard in range(_SHARDS)
            for language in options["languages"]
            for bucket in options["buckets"]
        ]
        if shards:
            names = random.Random(at.seed).sample(names, min(shards, len(names)))
        files = []
        for base in (_base(entry, at.folder) for entry in entries):
            for name in names:
                reader_options: dict[str, Any] = {"bucket": options["buckets"]}
                if options["duplicates"]:
                    reader_options["duplicates"] = f"{base}/duplicates/{name}.duplicates.parquet"
                files.append(InputFile(f"{base}/documents/{name}.json.gz", "redpajama_v2", None, reader_options))
        return files


@register
class RedPajamaV2Lines(JsonLines):
    """JSON lines with the field names of RedPajama-V2."""

    name, suffixes = "redpajama_v2", ()
    defaults: ClassVar[Mapping[str, Any]] = MappingProxyType({"text_key": "raw_content", "id_key": "id"})


def _base(entry: str, folder: Path) -> str:
    """Return the folder of a release as an absolute path or address."""
    if "://" in entry:
        return entry.rstrip("/")
    path = folder.absolute() / Path(entry).expanduser()
    if not (path / "documents").is_dir():
        raise UpcycleError(
            f"Copy of RedPajama-V2 {path}", kind="missing", got="has no folder `documents`", fix="check the path"
        )
    return str(path)
