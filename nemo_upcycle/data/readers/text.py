"""Plain text: a file is a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from nemo_upcycle.data.engine.encodings import COMPRESSED, decode
from nemo_upcycle.data.engine.lines import Damage, read_lines
from nemo_upcycle.data.readers import Format, Records, register


@register
class Text(Format):
    """Format with one document in a file; lines that are neither UTF-8 nor Latin-1 are omitted."""

    name, is_document = "text", True
    suffixes: ClassVar[tuple[str, ...]] = (".txt", *(f".txt{end}" for end in COMPRESSED))

    def read(self, file: str, options: Mapping[str, Any]) -> Records:
        """See `Format.read`."""
        kept: dict[int, str] = {}  # line number -> text
        other: dict[int, bytes] = {}
        size_bytes, is_empty = 0, True
        for line in read_lines(file):
            is_empty = False
            if isinstance(line, Damage):
                yield line.number, line.size_bytes, line.reason
                continue
            number, content = line
            size_bytes += len(content)
            try:
                kept[number] = content.decode()
            except UnicodeDecodeError:
                kept[number], other[number] = "", content
        try:
            decode(b"".join(other.values()))  # all lines together, because one line may look like another encoding
            kept |= {number: decode(content) for number, content in other.items()}
        except UnicodeDecodeError:
            for number, content in other.items():
                size_bytes -= len(content)
                del kept[number]
                yield number, len(content), "not UTF-8"
        if kept:
            yield 1, size_bytes, {options.get("text_key", "text"): "".join(kept.values())}
        elif is_empty:
            yield 1, 0, "empty file"
