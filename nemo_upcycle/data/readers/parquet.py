"""Parquet: a row is a document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_upcycle.data.engine.encodings import PARQUET
from nemo_upcycle.data.engine.lines import OtherFormatError, open_input
from nemo_upcycle.data.readers import Format, Records, register


@register
class Parquet(Format):
    """Format with a document in each row, from a column of texts and a column of ids."""

    name, suffixes = "parquet", (".parquet",)

    def read(self, file: str, options: Mapping[str, Any]) -> Records:
        """See `Format.read`."""
        import pyarrow
        import pyarrow.parquet

        keys = [options.get("text_key", "text"), options.get("id_key", "id"), "bucket"]
        row = size_bytes = 0
        with open_input(file) as handle:
            if handle.read(len(PARQUET)) != PARQUET:
                raise OtherFormatError("jsonl")
            try:
                table = pyarrow.parquet.ParquetFile(handle)
                there = [key for key in keys if key in table.schema_arrow.names]
                if keys[0] not in there:
                    columns = [one.name for one in table.schema_arrow if _is_text(one.type)]
                    yield 0, None, dict.fromkeys(columns, "")
                    return
                if table.metadata.num_rows == 0:
                    yield 0, 0, "empty file"
                for batch in table.iter_batches(1000, columns=there, use_threads=False):
                    for record in batch.to_pylist():
                        row += 1
                        text = record[keys[0]]
                        text_bytes = len(text.encode()) if isinstance(text, str) else 0
                        size_bytes += text_bytes
                        yield row, text_bytes, record
            except (pyarrow.ArrowException, OSError, ValueError) as error:
                left = (table.metadata.num_rows - row) * size_bytes // row if row else None
                yield row + 1, left, f"damaged Parquet file ({type(error).__name__})"


def _is_text(kind: Any) -> bool:
    """Return whether a Parquet column holds texts, plain or dictionary-encoded."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))
