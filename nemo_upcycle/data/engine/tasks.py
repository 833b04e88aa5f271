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


#: Maximum number of tasks, because each task has its own priority, and datatrove stores priorities in 16 bits.
MAX_TASKS = 65_535
#: File in the plan's folder that holds `EnginePlan.fingerprint` of the work that the engine began.
BEGUN = "engine.json"
#: Format version of the files that one stage writes for another stage.
_FORMAT = 2


@dataclass(frozen=True)
class Task:
    """Files of one source that one process reads, in this order.

    Args:
        source: name of the source.
        reader: key of `nemo_upcycle.data.readers.FORMATS`.
        files: paths or fsspec URLs.
        split: split of the documents; None divides the documents among the splits, see `EnginePlan.hold_out`.
        options: options of the reader, which are `text_key`, `id_key`, `bucket` (one name or several), `duplicates`
            (file -> list of its duplicates) and `part` (part of the only file, see `read_lines`).
        max_tokens: maximum number of training tokens to take from all tasks of the source together; None takes all.
        on_hit: treatment of a training document that shares a passage with an evaluation item, `cut` or `drop`.
        pii: kinds of personal data to replace in the documents, out of `nemo_upcycle.data.blend.PII`.
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
    """Everything that affects the engine's output; the number of workers does not affect it.

    Args:
        folder: folder of the plan, which receives all output.
        tokenizer: path of a `tokenizer.json`.
        eos_id: id of the token that ends every document.
        vocab_size: number of token ids; above 65,536 a token takes 4 bytes instead of 2.
        tasks: tasks in order; of two equal documents, the document in the earlier task is kept.
        ngram_index: path of the n-grams of the evaluation items, as `NgramIndex` reads them; None skips
            decontamination.
        seed: random seed for the splits, and for the choice of documents if a source has too many tokens.
        strict: whether bad input is an error.
        deduplicate: whether to keep only the first of equal documents.
        finders: number of tasks that search for duplicates.
        min_characters: length of the shortest document to keep (characters).
        hold_out: shares of `validation` and `heldout`, for tasks without a split.
        near_duplicates: `bands`, `hashes_per_band` and `n_grams` of MinHash; None keeps near duplicates.
        heldout_overlap: largest fraction of a held-out document's words that may be in training documents, too. The
            same limit applies to the words of a training document that are in held-out documents. None skips the
            search.
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
        """Return the path of a task's output of one kind, for example `tokens/00003.train.bin`."""
        return self.folder / kind / f"{rank:05d}.{suffix}"

    @cached_property
    def names(self) -> dict[tuple[str, str], str]:
        """The name of every file inside its source, so that document ids do not depend on the location of the data."""
        files: dict[str, list[str]] = {}
        for task in self.tasks:
            files.setdefault(task.source, []).extend(task.files)
        return {(source, file): name for source, paths in files.items() for file, name in names_inside(paths).items()}

    def fingerprint(self) -> dict[str, Any]:
        """Describe everything that must be equal to resume the work of an earlier run."""
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
        UpcycleError: the plan is missing or has too many tasks, or datatrove would read the name of the plan's folder
            as a pattern.
    """
    content = read_json(path)
    if set("*?[") & set(str(path)):
        raise UpcycleError(
            f"Folder {path.parent}",
            kind="refused",
            got="has * ? or [ in its name, which datatrove reads as a pattern",
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
    """Return a hidden and unique name under which to write a file, because a job may be started twice."""
    return path.with_name(f".{path.name}{_HALF}{uuid4().hex[:8]}")


def clear_asides(plan: EnginePlan) -> None:
    """Delete unfinished files of killed tasks."""
    for kind in ("tokens", "removed"):
        for path in (plan.folder / kind).glob(f".*{_HALF}*"):
            path.unlink(missing_ok=True)
