"""The engine's plan, and the names of the files that it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from nemo_upcycle.data.blend import SPLITS
from nemo_upcycle.data.engine.records import names_inside
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, sha256_file


#: datatrove keeps the priority of a document, here that of its task, in 16 bits.
MAX_TASKS = 65_535
#: File in the folder of the plan: `EnginePlan.fingerprint` of the work that the engine began.
BEGUN = "engine.json"
#: Of the files that one stage leaves for another.
_FORMAT = 2


@dataclass(frozen=True)
class Task:
    """Some files of one source, read in this order by one process.

    Args:
        source: the name of the source.
        reader: a key of `nemo_upcycle.data.readers.FORMATS`.
        files: paths or fsspec URLs.
        split: split of its documents; None spreads them over the splits, see `EnginePlan.hold_out`.
        options: the reader's options: `text_key`, `id_key`, `bucket` (one name or several), `duplicates` (file -> its
            list), `part` (part of its only file, see `read_lines`).
        max_tokens: training tokens to take from all tasks of its source together; None takes all.
        on_hit: what happens to a training document that shares a passage with an evaluation item.
        pii: kinds of personal data to replace in its documents, out of `nemo_upcycle.data.blend.PII`.
    """

    source: str
    reader: str
    files: list[str]
    split: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    on_hit: str = "cut"
    pii: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class EnginePlan:
    """All that determines the output; the number of workers does not.

    Args:
        folder: the folder of the plan, where all the output goes.
        tokenizer: a `tokenizer.json`.
        eos_id: the token that ends every document.
        vocab_size: number of token ids; above 65,536 a token takes 4 bytes.
        tasks: tasks; of two equal documents the one in the earlier task stays.
        ngram_index: the n-grams of the evaluation items, as `NgramIndex` reads them; None decontaminates nothing.
        seed: seed of the spreading over the splits.
        strict: whether bad input is an error.
        deduplicate: whether of equal documents only the first is kept.
        finders: number of tasks that look for duplicates.
        min_characters: the shortest document to keep.
        hold_out: the shares of `validation` and `heldout`, for tasks without a split.
        near_duplicates: `bands`, `hashes_per_band` and `n_grams` of MinHash, where near duplicates are removed, too.
        heldout_overlap: the largest part of its words that a held-out document may share with training documents,
            or one of these with held-out documents; None looks for none.
    """

    folder: Path
    tokenizer: str
    eos_id: int
    vocab_size: int
    tasks: tuple[Task, ...]
    ngram_index: str | None = None
    seed: int = 1234
    strict: bool = False
    deduplicate: bool = True
    finders: int = 1
    min_characters: int = 1
    hold_out: dict[str, float] = field(default_factory=dict)
    near_duplicates: dict[str, int] | None = None
    heldout_overlap: float | None = None

    def path(self, kind: str, rank: int, suffix: str) -> Path:
        """Return where a task's output of a kind lies, for example `tokens/00003.train.bin`."""
        return self.folder / kind / f"{rank:05d}.{suffix}"

    @cached_property
    def names(self) -> dict[tuple[str, str], str]:
        """The name of every file inside its source: no document's id depends on where the data lie."""
        files: dict[str, list[str]] = {}
        for task in self.tasks:
            files.setdefault(task.source, []).extend(task.files)
        return {(source, file): name for source, paths in files.items() for file, name in names_inside(paths).items()}

    def fingerprint(self) -> dict[str, Any]:
        """Describe everything that must be equal to continue the work of an earlier run."""
        inputs = [Path(path) for path in (self.tokenizer, self.ngram_index) if path]
        return {
            "format": _FORMAT,
            "plan": read_json(self.folder / "plan.json"),
            "sha256": {path.name: sha256_file(path) for path in inputs},
        }


@lru_cache(maxsize=1)
def load_plan(path: Path) -> EnginePlan:
    """Read the plan that `nemo-upcycle data` wrote.

    Raises:
        UpcycleError: it is missing, has too many tasks, or datatrove would read its folder's name as a pattern.
    """
    content = read_json(path)
    if set("*?[") & set(str(path)):
        raise UpcycleError(
            f"Folder {path.parent}",
            kind="refused",
            got="has * ? or [ in its name, which datatrove interprets",
            fix="choose another folder",
        )
    if (count := len(content["tasks"])) > MAX_TASKS:
        raise UpcycleError(
            "number of tasks", got=count, expected=f"at most {MAX_TASKS}", fix="divide the blend into several blends"
        )
    tasks = tuple(Task(**task) for task in content["tasks"])
    return EnginePlan(**{**content, "folder": path.resolve().parent, "tasks": tasks})


def outputs(plan: EnginePlan, rank: int) -> Iterator[Path]:
    """Yield every file of tokens or texts that a task may write."""
    for split in SPLITS[:2]:
        yield from (plan.path("tokens", rank, f"{split}.{suffix}") for suffix in ("bin", "idx"))
    yield plan.path("tokens", rank, f"{SPLITS[2]}.jsonl")


_HALF = ".half."


def aside(path: Path) -> Path:
    """Return the hidden name under which a file is written: one of its own, for a job may be started twice."""
    return path.with_name(f".{path.name}{_HALF}{uuid4().hex[:8]}")


def clear_asides(plan: EnginePlan) -> None:
    """Delete unfinished files of killed tasks."""
    for kind in ("tokens", "removed"):
        for path in (plan.folder / kind).glob(f".*{_HALF}*"):
            path.unlink(missing_ok=True)
