"""The record of a task: counts, times, and a line for each document or passage removed."""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import IO, Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from xxhash import xxh3_128

from nemo_upcycle.data.engine.tasks import EnginePlan, Task, aside, load_plan
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import write_json
from nemo_upcycle.utils.masking import without_secrets


#: Counts of a task that are known after a first pass over its documents.
_FIRST_PASS = ("bytes_in", "lost", "fields", "files", "steps")
_FIELDS = 8
STEPS = ("read", "filter", "deduplicate", "overlap", "decontaminate", "tokenise")


class Ledger:
    """The record of the task at hand, shared by the steps of one pipeline.

    Args:
        plan_path: path of the plan.
        is_kept: whether to write the record; only the last pass over the documents writes it.
    """

    def __init__(self, plan_path: Path, *, is_kept: bool) -> None:
        self.plan_path, self.is_kept = plan_path, is_kept
        self._lines: IO[str] | None = None

    def __str__(self) -> str:  # datatrove describes its pipelines in JSON
        return f"Ledger({self.plan_path})"

    @property
    def plan(self) -> EnginePlan:
        """The plan, read once per process."""
        return load_plan(self.plan_path)

    @property
    def task(self) -> Task:
        """The task at hand."""
        return self.plan.tasks[self.rank]

    def begin(self, rank: int) -> None:
        """Start the record of a task."""
        self.rank = rank
        self.passed: Counter[str] = Counter()  # documents that left a step
        self.removed_by: dict[str, Counter[str]] = defaultdict(Counter)
        self.lost_by: dict[str, dict[str, Any]] = {}  # reason -> counts of what could not be read
        self.fields: Counter[str] = Counter()  # field -> characters, in records without a text
        self.upstream_s: dict[str, float] = {}  # CPU seconds of a step and all steps before it
        self.files: dict[str, dict[str, int | bool | None]] = {}
        self.texts: dict[str, xxh3_128] = {}  # file -> hash of all texts read from it
        self.bytes_in = self.records_in = 0
        self.text = {"documents": 0, "bytes": 0}  # training text read so far
        self.splits: dict[str, Counter[str]] = defaultdict(Counter)
        self.contamination: Any = None  # counts of the decontamination, if the plan has one
        self.report: Any = None  # counts of short n-grams in the remaining documents
        self.cut: Counter[str] = Counter()  # documents that were cut into pieces
        self.pii: Counter[str] = Counter()  # kind -> number of replacements
        self.tokenizer = ""
        self._start_s = time.process_time()
        if self.is_kept:
            self._aside = aside(self.plan.path("removed", rank, "jsonl"))
            self._aside.parent.mkdir(exist_ok=True)
            self._lines = self._aside.open("w", encoding="utf-8")

    def lost(
        self, reason: str, identity: str, where: str, size_bytes: int | None, *, is_whole: bool = False, **more: Any
    ) -> None:
        """Count an unreadable record, and write its line.

        A `size_bytes` of None means a file of unknown size. `is_whole` means that the whole file is lost.

        Raises:
            UpcycleError: the plan is strict.
        """
        if self.plan.strict:
            raise UpcycleError(f"{where}:", kind="state", got=reason, fix="correct it, or omit --strict")
        lost = self.lost_by.setdefault(reason, {"documents": 0, "bytes": 0, "files": 0, "first": where})
        lost["documents"] += 1
        lost["bytes"] += size_bytes or 0
        lost["files"] += size_bytes is None
        if is_whole:
            lost["whole"] = lost.get("whole", 0) + 1
        self.removed("read", reason, identity, where, size_bytes or 0, **more)

    def removed(self, step: str, reason: str, identity: str, where: str, size_bytes: int, **more: Any) -> None:
        """Count a removal by a step, and write its line."""
        self.removed_by[step][reason] += 1
        self.note(step, reason, identity, where, size_bytes, **more)

    def note(self, step: str, reason: str, identity: str, where: str, size_bytes: int, **more: Any) -> None:
        """Write a line without counting, for a part that was removed from a document."""
        if self._lines:
            named = without_secrets({"id": identity, "where": where})
            line = {"step": step, "reason": reason, **named, "bytes": size_bytes, **more}
            self._lines.write(json.dumps(line) + "\n")

    def removed_document(self, step: str, reason: str, document: Document, **more: Any) -> None:
        """Count a document that a step removed, and write its line."""
        size_bytes = len(document.text.encode())
        self.removed(step, reason, document.id, document.metadata["where"], size_bytes, **more)

    def finish(self) -> None:
        """Write the record; an interrupted write leaves no incomplete file."""
        if not self._lines:
            return
        self._lines.close()
        self._lines = None
        self._aside.replace(self.plan.path("removed", self.rank, "jsonl"))
        write_json(self.plan.path("stats", self.rank, "json"), self.summary())

    def summary(self) -> dict[str, Any]:
        """Return the counts; at every step, `in` equals `kept` plus all removals."""
        steps, seconds, comes_in, before_s = {}, {}, self.records_in, 0.0
        self.upstream_s["tokenise"] = time.process_time() - self._start_s
        self.passed["tokenise"] = self.passed["decontaminate"] - sum(self.removed_by["tokenise"].values())
        for step in STEPS:
            removed = dict(sorted(self.removed_by[step].items()))
            kept = self.passed[step]
            if step == "decontaminate":  # the pieces of a document count as one kept document
                kept -= self.cut["pieces"] - self.cut["documents"]
            steps[step] = {"in": comes_in, "kept": kept, "removed": removed}
            seconds[step] = round(self.upstream_s.get(step, before_s) - before_s, 3)
            comes_in, before_s = self.passed[step], self.upstream_s.get(step, before_s)
        return {
            "source": self.task.source,
            "bytes_in": self.bytes_in,
            "lost": self.lost_by,
            "fields": dict(self.fields.most_common(_FIELDS)),
            "steps": steps,
            "splits": {split: dict(counts) for split, counts in sorted(self.splits.items()) if counts},
            "seconds": seconds,
            "tokenizer": self.tokenizer,
            "contamination": self.contamination.to_dict() if self.contamination else {},
            "report": self.report.to_dict() if self.report else {},
            "cut": {key: self.cut[key] for key in ("documents", "pieces", "bytes")},
            "pii": dict(self.pii),
            "files": {
                file: known | {"texts_xxh3_128": self.texts[file].hexdigest()} for file, known in self.files.items()
            },
        }


class LedgerStep(PipelineStep):
    """A step that writes to the record of its task.

    Args:
        ledger: record that all steps of a pipeline share.
    """

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger


class CountDocuments(LedgerStep):
    """Counts the documents that leave a step, and the CPU seconds spent up to the end of this step."""

    type, name = "count", "documents that leave a step"

    def __init__(self, ledger: Ledger, step: str) -> None:
        super().__init__(ledger)
        self.step = step

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        passed, upstream_s, step, clock = self.ledger.passed, self.ledger.upstream_s, self.step, time.process_time
        upstream_s[step] = 0.0
        start_s = clock()
        for document in data:
            upstream_s[step] += clock() - start_s
            passed[step] += 1
            yield document
            start_s = clock()
        upstream_s[step] += clock() - start_s


class CountText(LedgerStep):
    """Counts the training documents and their bytes.

    The first pass writes these counts, and the counts of unreadable records, before anything is tokenised.
    """

    type, name = "count", "text to train on"

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Pass documents on."""
        counts = self.ledger.text
        for document in data:
            if document.metadata["split"] == "train":
                counts["documents"] += 1
                counts["bytes"] += document.metadata["bytes"]
            yield document
        if not self.ledger.is_kept:
            read = {key: value for key, value in self.ledger.summary().items() if key in _FIRST_PASS}
            write_json(self.ledger.plan.path("read", rank, "json"), counts | read)
