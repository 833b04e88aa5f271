"""What of a source could not be read: counted by reason, said, and refused above the blend's `max_lost`."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.readers import NO_FIELD, READERS
from nemo_upcycle.errors import LostError


#: A larger share is warned about.
_WARNED = 0.01


def count_lost(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count what the tasks of a source could not read.

    Args:
        tasks: what the engine counted of each.

    Returns:
        `share`, the larger one of that of documents and of bytes, 0 to 1; and by reason `documents`, `bytes` and the
        `first` place. A file whose size nobody says counts as many bytes as the others have on average.

    Example:
        >>> lost = {"broken JSON": {"documents": 1, "bytes": 30, "files": 0, "first": "a.jsonl:7"}}
        >>> count_lost([{"bytes_in": 1000, "files": {"a.jsonl": {}}, "steps": {"read": {"in": 10}}, "lost": lost}])
        {'share': 0.1, 'reasons': {'broken JSON': {'documents': 1, 'bytes': 30, 'first': 'a.jsonl:7'}}}
    """
    documents, size_bytes = sum(task["steps"]["read"]["in"] for task in tasks), sum(task["bytes_in"] for task in tasks)
    file_bytes = size_bytes // max(1, sum(len(task["files"]) for task in tasks))
    reasons: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for reason, one in task["lost"].items():
            into = reasons.setdefault(reason, {"documents": 0, "bytes": 0, "first": one["first"]})
            into["documents"] += one["documents"]
            into["bytes"] += one["bytes"] + one["files"] * file_bytes
            size_bytes += one["files"] * file_bytes
    lost = {key: sum(one[key] for one in reasons.values()) for key in ("documents", "bytes")}
    share = max(lost["documents"] / max(1, documents), lost["bytes"] / max(1, size_bytes))
    return {"share": round(share, 4), "reasons": dict(sorted(reasons.items()))}


def lost_text(lost: Mapping[str, Any]) -> list[str]:
    """Describe the counts of `count_lost`, one line a reason."""
    return [
        f"{one['documents']:,} documents, {one['bytes']:,} bytes: {reason}, first at {one['first']}"
        for reason, one in lost["reasons"].items()
    ]


def require_read(blend: Blend, source: str, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Warn of what could not be read of a source.

    Raises:
        LostError: it is more than its `max_lost`.
    """
    lost, most = count_lost(tasks), blend.config.sources[source].max_lost
    text = f"{lost['share']:.1%} of what was to be read is lost ({'; '.join(lost_text(lost))})"
    if lost["share"] > most:
        correct = text_field(blend, source, tasks) or "correct the files"
        enough = math.ceil(100 * lost["share"]) / 100
        raise LostError(
            f"source {source}",
            got=text,
            expected=f"at most {most:.1%}, its max_lost",
            fix=f"{correct}, and build in another folder; or set sources.{source}.max_lost to {enough:g} and run the"
            " same command, which continues",
        )
    if lost["share"] > _WARNED:
        sys.stderr.write(f"warning: source {source}: {text}\n")


def text_field(blend: Blend, source: str, tasks: Iterable[Mapping[str, Any]]) -> str:
    """Return how to name the field that most records have in place of a text; empty: a text, or no field."""
    fields: Counter[str] = Counter()
    documents = without = 0
    for task in tasks:
        fields.update(task["fields"])
        documents += task["steps"]["read"]["in"]
        without += sum(one["documents"] for reason, one in task["lost"].items() if reason.startswith(NO_FIELD))
    has_key = "text_key" in READERS[blend.config.sources[source].reader].options
    if not fields or not has_key or 2 * without <= documents:
        return ""
    names = [name for name, _ in fields.most_common()]
    return f"set sources.{source}.options.text_key={names[0]} (fields of text there: {', '.join(names)})"
