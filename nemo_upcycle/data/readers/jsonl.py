"""JSON lines, compressed or not: a line is a document."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_upcycle.data.engine.encodings import COMPRESSED, decode
from nemo_upcycle.data.engine.lines import Damage, read_lines
from nemo_upcycle.data.readers import Format, Records, register


@register
class JsonLines(Format):
    """Format with a JSON object in each line."""

    name = "jsonl"
    suffixes: ClassVar[tuple[str, ...]] = (
        ".jsonl",
        *(f"{name}{end}" for name in (".jsonl", ".json") for end in COMPRESSED),
    )

    def read(self, file: str, options: Mapping[str, Any]) -> Records:
        """See `Format.read`."""
        is_empty = True
        for line in read_lines(file, options.get("part")):
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
            value = json.loads(decode(line))  # Python writes NaN, which orjson refuses
            orjson.dumps(value)  # fails for half of a surrogate pair
        except UnicodeDecodeError:
            return "not UTF-8"
        except (ValueError, TypeError, RecursionError):
            return "broken JSON"
    return value if isinstance(value, dict) else "no JSON object"
