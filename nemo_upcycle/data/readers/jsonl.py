"""JSON lines, compressed or not: a line is a document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_upcycle.data.engine.lines import Damage, open_input, read_lines
from nemo_upcycle.data.readers import Format, Records, register


@register
class JsonLines(Format):
    """An object a line."""

    name = "jsonl"
    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst")

    def read(self, file: str, options: Mapping[str, Any]) -> Records:
        """See `Format.read`."""
        is_empty = True
        with open_input(file) as handle:
            for line in read_lines(file, handle):
                is_empty = False
                if isinstance(line, Damage):
                    yield line.number, line.size_bytes, line.reason
                    continue
                number, content = line
                if content.strip():
                    yield number, len(content), _parsed(content)
        if is_empty:
            yield 0, 0, "empty file"


def _parsed(line: bytes) -> dict[str, Any] | str:
    import orjson

    try:
        value = orjson.loads(line)
    except ValueError:
        try:
            value = json.loads(line.decode())  # Python writes NaN, which orjson refuses
            orjson.dumps(value)  # a half of a surrogate pair is no text
        except UnicodeDecodeError:
            return "not UTF-8"
        except (ValueError, TypeError, RecursionError):
            return "broken JSON"
    return value if isinstance(value, dict) else "no JSON object"
