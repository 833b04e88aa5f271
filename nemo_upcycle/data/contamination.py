"""Index the evaluation items of suites, find them in training data, and count the passages removed."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_upcycle.data.ngrams import BOILERPLATE, SHORT_WORDS, SHORTEST, WORDS, NgramIndex
from nemo_upcycle.data.passages import Hit
from nemo_upcycle.data.suites.items import set_name, suite_items
from nemo_upcycle.data.suites.lm_eval_tasks import TaskDataError
from nemo_upcycle.data.suites.suite_config import SuiteConfig
from nemo_upcycle.errors import UpcycleError


EXAMPLES = 20
_EXAMPLE_CHARACTERS = 200


def check_suites(suites: Mapping[str, SuiteConfig], without: Sequence[str] = ()) -> None:
    """Check the arguments of `build_index` without loading the data of any task.

    Raises:
        UpcycleError: none of the suites contains a task in `without`.
    """
    asked = [task for config in suites.values() if not config.local for task in config.tasks]
    for name in without:
        if not asked:
            fix = "omit it"
            raise UpcycleError(
                "decontaminate_without",
                kind="refused",
                got=f"names {name}, but no suite of decontaminate has a task of lm-eval",
                fix=fix,
            )
        if name not in asked:
            raise UpcycleError.unknown("decontaminate_without: task", name, asked)


def build_index(suites: Mapping[str, SuiteConfig], path: Path, without: Sequence[str] = ()) -> dict[str, Any]:
    """Write an index of the n-grams in all items of the suites.

    Args:
        suites: suite -> its configuration. Suites of lm-eval's own tasks need the Hugging Face hub, or its cache.
        path: file to write.
        without: tasks of these suites to leave out of the search.

    Returns:
        `suites`, `without` (evaluation sets omitted from the search), `words`, `shortest` and `boilerplate` (settings
        of the search), `ngrams` (number of n-grams), `sets` (`NgramIndex.summary` of each evaluation set) and `report`
        (the same values for the short n-grams, whose matches in the remaining text are only reported).

    Raises:
        UpcycleError: a task is unknown, or its data cannot be fetched. No evaluation set is skipped silently.

    Example:
        >>> build_index(read_blend("sotu").suites, Path("ngrams.npz"))["sets"]["mmlu"]["items"]  # doctest: +SKIP
        24
    """
    try:
        items = {(item.name, item.id): item for config in suites.values() for item in suite_items(config, without)}
    except TaskDataError as error:
        error.fix += "; or name the task in decontaminate_without, to train without a search for its questions"
        raise
    index = NgramIndex.build(items.values(), short_words=SHORT_WORDS)
    index.save(path)
    settings = {"shortest": SHORTEST, "boilerplate": BOILERPLATE}
    long, short = (len(index.arrays[f"{name}_hashes"]) for name in ("long", "short"))
    return {
        "suites": list(suites),
        "without": [set_name(name) for name in without],
        **{"words": WORDS, **settings, "ngrams": long, "sets": index.summary},
        "report": {"words": SHORT_WORDS, **settings, "ngrams": short, "sets": index.short_summary},
    }


class Contamination:
    """The contamination counts of one engine task, by evaluation set.

    A passage that appears in items of two sets counts for both.

    Args:
        index: index that finds the passages.

    Example:
        >>> counts = Contamination(index)  # doctest: +SKIP
        >>> hits = index.find(text)  # doctest: +SKIP
        >>> counts.add("7", "part.jsonl:7", text, hits, removed_spans(text, hits))  # doctest: +SKIP
    """

    def __init__(self, index: NgramIndex) -> None:
        self._index = index
        self._counts: dict[str, dict[str, int]] = defaultdict(lambda: {"documents": 0, "passages": 0, "bytes": 0})
        self._items: dict[str, set[str]] = defaultdict(set)
        self._examples: dict[str, list[dict[str, str]]] = defaultdict(list)
        self._last: dict[str, str] = {}  # set -> place of its last document, to count all pieces of a document once

    def add(
        self, identity: str, where: str, text: str, hits: Sequence[Hit], removed: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Count the hits of a document, or of one piece; add the pieces of a document one after the other.

        Args:
            identity: id of the document.
            where: file and line.
            text: text of the document.
            hits: result of `NgramIndex.find`.
            removed: removed spans (first character, one past the last): `removed_spans(text, hits)`, or
                `[(0, len(text))]` for the whole text; empty if the hits are only reported.
        """
        spans = list(removed)
        starts = [start for start, _ in spans]
        touched: dict[str, set[int]] = defaultdict(set)
        for hit in hits:
            span = bisect_right(starts, hit.start) - 1
            ids: dict[str, list[str]] = defaultdict(list)
            for number in hit.items:
                name, item = self._index.item(number)
                ids[name].append(item)
            for name, items in ids.items():
                self._counts[name]["passages"] += 1
                self._items[name].update(items)
                touched[name].update([span] if spans else [])
                if len(self._examples[name]) < EXAMPLES:
                    words = " ".join(text[hit.start : hit.stop].split())[:_EXAMPLE_CHARACTERS]
                    self._examples[name].append({"id": identity, "where": where, "words": words, "item": items[0]})
        for name, numbers in touched.items():
            self._counts[name]["documents"] += self._last.get(name) != where
            self._last[name] = where
            for start, stop in (spans[number] for number in numbers):
                self._counts[name]["bytes"] += len(text[start:stop].encode("utf-8", "surrogatepass"))

    def to_dict(self) -> dict[str, Any]:
        """Return counts, items and examples of each evaluation set that was hit, as plain values for JSON."""
        return {
            name: {**self._counts[name], "items": sorted(self._items[name]), "examples": self._examples[name]}
            for name in sorted(self._counts)
        }


def merge_contamination(parts: Iterable[dict[str, Any]], index: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Merge the counts of all tasks into the content of `contamination.json`.

    Args:
        parts: `Contamination.to_dict()` of every task, in order.
        index: `NgramIndex.summary` of the index that was used.

    Returns:
        For each evaluation set of the index, with or without hits: its entry in `index`, `items_hit` (number of its
        items that were found), the sums of `documents`, `passages` and `bytes` (removed text, UTF-8) over the tasks,
        and up to `EXAMPLES` examples. An example has the document's `id` and `where`, the matched `words`, and an
        `item` that contains these words.

    Example:
        >>> merge_contamination([{}], {"mmlu": {"items": 14042}})["mmlu"]["items_hit"]
        0
    """
    merged: dict[str, Any] = {
        name: {**known, "items_hit": 0, "documents": 0, "passages": 0, "bytes": 0, "examples": []}
        for name, known in index.items()
    }
    items: dict[str, set[str]] = defaultdict(set)
    for part in parts:
        for name, counts in part.items():
            entry = merged[name]
            for key in ("documents", "passages", "bytes"):
                entry[key] += counts[key]
            items[name].update(counts["items"])
            entry["items_hit"] = len(items[name])
            entry["examples"] = [*entry["examples"], *counts["examples"]][:EXAMPLES]
    return merged
