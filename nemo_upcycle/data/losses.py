"""Count the unreadable part of a source, and stop a build early if too much is lost or too little remains."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.engine.tasks import BEGUN
from nemo_upcycle.data.readers import NO_FIELD, READERS
from nemo_upcycle.errors import LostError, UpcycleError
from nemo_upcycle.utils.files import read_json


#: Lost share above which a warning is shown.
_WARNED = 0.01
#: Bytes in a token of English text with most tokenizers, to estimate tokens from bytes.
_BYTES_PER_TOKEN = 4
#: Folders of the records that the engine writes for each task: in the first pass, and in the last pass.
_READ, _STATS = "read", "stats"
_TRAIN = ("documents", "bytes", "tokens")


def count_lost(tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Count the documents and bytes that the tasks of a source could not read.

    Args:
        tasks: counts of the engine, one entry for each task.

    Returns:
        `share` is the lost share of the documents or of the bytes, whichever is larger, 0 to 1. `reasons` maps each
        reason to `documents`, `bytes`, the `first` place, and `whole` (number of files lost entirely; each counts as
        one document). A file of unknown size counts as a file of average size.

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
            if whole := one.get("whole", 0):
                into["whole"] = into.get("whole", 0) + whole
            into["bytes"] += one["bytes"] + one["files"] * file_bytes
            size_bytes += one["files"] * file_bytes
    lost = {key: sum(one[key] for one in reasons.values()) for key in ("documents", "bytes")}
    share = max(lost["documents"] / max(1, documents), lost["bytes"] / max(1, size_bytes))
    return {"share": round(share, 4), "reasons": dict(sorted(reasons.items()))}


def lost_text(lost: Mapping[str, Any]) -> list[str]:
    """Describe the counts of `count_lost`, one line for each reason."""
    return [
        f"{_lost_count(one)}, {one['bytes']:,} bytes: {reason}, first at {one['first']}"
        for reason, one in lost["reasons"].items()
    ]


def _lost_count(one: Mapping[str, Any]) -> str:
    """Describe how many documents and how many whole files are lost."""
    whole = one.get("whole", 0)
    counts = {"document": one["documents"] - whole, "whole file": whole}
    return " and ".join(f"{count:,} {name}{'s' * (count != 1)}" for name, count in counts.items() if count)


def require_read(blend: Blend, source: str, tasks: Sequence[Mapping[str, Any]]) -> None:
    """Warn if more than 1 % of a source could not be read.

    Raises:
        LostError: the lost share exceeds the source's `max_lost`.
    """
    lost, most = count_lost(tasks), blend.config.sources[source].max_lost
    text = f"loses {lost['share']:.1%} of its text ({'; '.join(lost_text(lost))})"
    if lost["share"] > most:
        correct = text_field(blend, source, tasks) or "correct the files"
        enough = math.ceil(100 * lost["share"]) / 100
        raise LostError(
            f"Source {source}",
            kind="state",
            got=f"{text}, more than its max_lost ({most:.1%}) allows",
            fix=(
                f"{correct}, and build in another folder; or set sources.{source}.max_lost to {enough:g} and run the "
                "same command again, which continues"
            ),
        )
    if lost["share"] > _WARNED:
        sys.stderr.write(f"warning: source {source} {text}\n")


def text_field(blend: Blend, source: str, tasks: Iterable[Mapping[str, Any]]) -> str:
    """Return the fix that names the right text field, if most records lack the expected field; "" otherwise."""
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


def size_check(blend: Blend, work: Path, plan: Mapping[str, Any]) -> Callable[[], None]:
    """Return a function that checks the engine's output so far; it is meant to be called repeatedly.

    When the engine has read all tasks of a source, the function refuses the source if too much of it was unreadable.
    At this time, and again after tokenising, the function refuses the source if it has no training sequence. When the
    engine has read all sources, the function shows how much a run reads from each source.

    Args:
        blend: the blend.
        work: folder of the engine.
        plan: plan of the engine; files of another plan are ignored.
    """
    tasks = list(enumerate(plan["tasks"]))
    ranks = {name: [rank for rank, task in tasks if task["source"] == name] for name in blend.config.sources}
    waiting = {(kind, name): list(numbers) for kind in (_READ, _STATS) for name, numbers in ranks.items()}
    text_bytes: dict[str, int] = {}
    checked: set[str] = set()
    has_begun = False

    def check() -> None:
        nonlocal has_begun
        begun = work / BEGUN
        has_begun = has_begun or (begun.is_file() and read_json(begun)["plan"] == plan)
        if not has_begun:
            return
        for (kind, name), numbers in list(waiting.items()):
            while numbers and (work / kind / f"{numbers[-1]:05d}.json").is_file():
                numbers.pop()
            if numbers:
                continue
            del waiting[kind, name]
            counts = [read_json(work / kind / f"{rank:05d}.json") for rank in ranks[name]]
            train: Counter[str] = Counter()
            for one in counts:
                of_training = one if kind == _READ else one["splits"].get("train", {})
                train.update({key: of_training[key] for key in _TRAIN if key in of_training})
            _require_sequence(blend, name, train, counts)
            if name not in checked:
                checked.add(name)
                require_read(blend, name, counts)
            if kind == _READ:
                text_bytes[name] = train["bytes"]
                if len(text_bytes) == len(ranks):
                    sys.stderr.write("\n".join(expected_draw(blend, text_bytes)) + "\n")

    return check


def _require_sequence(blend: Blend, source: str, train: Mapping[str, int], tasks: Sequence[Mapping[str, Any]]) -> None:
    """Check that a source has more tokens than one training sequence.

    `train` has `documents`, `bytes` and, if known, `tokens`.
    """
    most = train.get("tokens", train["bytes"] + 2 * train["documents"])  # at most 1 token per byte, plus end-of-text
    if most > blend.config.seq_length:
        return
    bound = "" if "tokens" in train else "at most "
    read = sum(task["steps"]["read"]["in"] for task in tasks)
    removed: Counter[str] = Counter()
    for task in tasks:
        for step, one in task["steps"].items():
            removed.update({why: n for why, n in one["removed"].items() if step != "read"})
    gone = lost_text(count_lost(tasks))
    gone += [f"{count:,} document{'s' * (count != 1)}: {why}" for why, count in removed.items()]
    field = text_field(blend, source, tasks)
    without = ", or remove the source from the blend" if len(blend.config.sources) > 1 else ""
    raise UpcycleError(
        f"Source {source}",
        kind="state",
        got=f"has {bound}{most:,} tokens to train on, in {train['documents']:,} of {read:,} documents"
        + (f" ({'; '.join(gone)})" if gone else "")
        + f". A source of {blend.share(source):.1%} of a run needs more than one sequence"
        f" ({blend.config.seq_length:,} tokens)",
        fix=f"{field or 'give it more text'}{without}, and build in another folder",
    )


def expected_draw(blend: Blend, text_bytes: Mapping[str, int]) -> list[str]:
    """Estimate how much a run reads from each source, given the sources' bytes of text; return a line for each."""
    lines = [f"{blend.name}, estimated at {_BYTES_PER_TOKEN} bytes a token:"]
    for name, source in blend.config.sources.items():
        tokens = text_bytes[name] / _BYTES_PER_TOKEN
        tokens = min(tokens, source.tokens or tokens)
        epochs = epochs_text(tokens, blend.share(name), blend.config.max_epochs)
        lines.append(f"  {name}: {blend.share(name):.1%} of a run, about {tokens:,.0f} tokens: {epochs}")
    return lines


def epochs_text(tokens: float, share: float, max_epochs: float) -> str:
    """Describe how long a run must be to read a source once, and `max_epochs` times.

    Args:
        tokens: tokens of the source.
        share: the source's share of the run's tokens, 0 to 1.
        max_epochs: `max_epochs` of the blend.

    Example:
        >>> epochs_text(3_000_000, 0.75, 4)
        '1 epoch in a run of 4,000,000 tokens, 4 epochs in a run of 16,000,000'
    """
    once = tokens / share
    return f"1 epoch in a run of {once:,.0f} tokens, {max_epochs:g} epochs in a run of {max_epochs * once:,.0f}"
