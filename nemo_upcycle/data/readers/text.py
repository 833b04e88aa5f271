"""Plain text: a file is a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.data.engine.lines import Damage, open_input, read_lines
from nemo_upcycle.data.readers import Format, Records, register


@register
class Text(Format):
    """A line that is not UTF-8 is left out of the document."""

    name, suffixes, is_document = "text", (".txt",), True

    def read(self, file: str, options: Mapping[str, Any]) -> Records:
        """See `Format.read`."""
        kept, size_bytes = [], 0
        with open_input(file) as handle:
            for line in read_lines(file, handle):
                if isinstance(line, Damage):
                    yield line.number, line.size_bytes, line.reason
                    continue
                number, content = line
                try:
                    kept.append(content.decode())
                    size_bytes += len(content)
                except UnicodeDecodeError:
                    yield number, len(content), "not UTF-8"
        yield 1, size_bytes, {options.get("text_key", "text"): "".join(kept)} if kept else "empty file"
