"""What a run would draw of each source, and sources that are too small or lost, said before all is tokenised."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.engine.plan import BEGUN
from nemo_upcycle.data.losses import count_lost, lost_text, require_read, text_field
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json


#: Of English text and most tokenizers, by which tokens are estimated.
_BYTES_PER_TOKEN = 4
#: What the engine writes of each task: what it read, in a pass before the last one; and what it made of it.
_READ, _STATS = "read", "stats"
_TRAIN = ("documents", "bytes", "tokens")


def size_check(blend: Blend, work: Path, plan: Mapping[str, Any]) -> Callable[[], None]:
    """Return a check of what the engine has written so far, to be called again and again.

    Once all tasks of a source have been read, and again once they are tokenised, it refuses a source that has no
    sequence to train on, or of which too much could not be read; once those of all sources have been read, it shows
    what a run would draw.

    Args:
        blend: the blend.
        work: the engine's folder.
        plan: what the engine is given; what it has from another one does not count.
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
    """Check what a source has to train on: `documents`, `bytes` and, if they are known, `tokens`."""
    most = train.get("tokens", train["bytes"] + 2 * train["documents"])  # a token has a byte, an end has none
    if most > blend.config.seq_length:
        return
    bound = "" if "tokens" in train else "at most "
    read = sum(task["steps"]["read"]["in"] for task in tasks)
    removed: Counter[str] = Counter()
    for task in tasks:
        for step, one in task["steps"].items():
            removed.update({why: n for why, n in one["removed"].items() if step != "read"})
    gone = [*lost_text(count_lost(tasks)), *(f"{count:,} documents: {why}" for why, count in removed.items())]
    field = text_field(blend, source, tasks)
    without = "take the source out of the blend and run the same command, which continues, or "
    raise UpcycleError(
        f"source {source}",
        got=f"{bound}{most:,} tokens to train on, in {train['documents']:,} of {read:,} documents"
        + (f" ({'; '.join(gone)})" if gone else ""),
        expected=f"more than a sequence ({blend.config.seq_length:,}), for {blend.share(source):.1%} of a run",
        fix=f"{without if len(blend.config.sources) > 1 else ''}{field or 'give it more text'}, in another folder",
    )


def expected_draw(blend: Blend, text_bytes: Mapping[str, int]) -> list[str]:
    """Return what a run would draw of each source, a line for each, from the bytes of their texts or files."""
    lines = [f"{blend.name}, estimated at {_BYTES_PER_TOKEN} bytes a token:"]
    for name, source in blend.config.sources.items():
        tokens = text_bytes[name] / _BYTES_PER_TOKEN
        tokens = min(tokens, source.tokens or tokens)
        epochs = epochs_text(tokens, blend.share(name), blend.config.max_epochs)
        lines.append(f"  {name}: {blend.share(name):.1%} of a run, about {tokens:,.0f} tokens: {epochs}")
    return lines


def epochs_text(tokens: float, share: float, max_epochs: float) -> str:
    """Say in how long a run a source is read once, and as often as it may be.

    Args:
        tokens: of the source.
        share: of the run's tokens that it has, 0 to 1.
        max_epochs: of the blend.

    Example:
        >>> epochs_text(3_000_000, 0.75, 4)
        '1 epoch in a run of 4,000,000 tokens, 4 in one of 16,000,000'
    """
    once = tokens / share
    return f"1 epoch in a run of {once:,.0f} tokens, {max_epochs:g} in one of {max_epochs * once:,.0f}"
