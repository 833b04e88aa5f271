"""Read a finished folder of `nemo-upcycle data`, and check that it is complete and undamaged."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, read_json_lines, require_complete, resolved
from nemo_upcycle.utils.schema import require_known


logger = logging.getLogger(__name__)
#: Format version of the manifest, and the names of the folder's files.
FORMAT = 2
BUILD = "build"
MANIFEST, CONTAMINATION, HELDOUT, TOKENIZER, TOKENS = (
    "manifest.json",
    "contamination.json",
    "heldout.jsonl",
    "tokenizer",
    "tokens",
)
#: File in `build` with the counts of `nemo_upcycle.data.engine.overlap`; it exists until the build is finished.
HELDOUT_OVERLAP = "overlap/summary.json"


@dataclass(frozen=True)
class Finished:
    """A finished folder of texts or conversations, and its manifest.

    Attributes:
        folder: absolute path without links, because Megatron names its indices after the paths of the data.
        manifest: content of `manifest.json`.
    """

    #: Kind and format in the manifest, key that holds the name, and command that makes such a folder.
    kind: ClassVar[str]
    format: ClassVar[int]
    key: ClassVar[str]
    command: ClassVar[str]
    folder: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """Return the name of the blend or of the conversations."""
        return str(self.manifest[self.key])

    @classmethod
    def read(cls, folder: str | Path) -> tuple[Path, dict[str, Any]]:
        """Read the manifest of a finished folder; return the folder's path without links, and the manifest.

        Raises:
            UpcycleError: the folder is unfinished, or has another kind or format.
        """
        folder = resolved(Path(folder).expanduser())
        require_complete(folder, "data folder", f"run `{cls.command} {cls.key.upper()} DIR` with it as DIR")
        manifest = read_json(path := folder / MANIFEST)
        require_known(manifest, path)
        form = manifest.get("kind", "texts"), manifest.get("format", "")
        if form != (cls.kind, cls.format):
            got, fix = " ".join(map(str, form)).strip(), f"make the folder with `{cls.command}` of this version"
            raise UpcycleError(f"format of {path}", got=got, expected=f"{cls.kind} {cls.format}", fix=fix)
        return folder, manifest

    def lines(self) -> list[dict[str, Any]]:
        """Read the lines of the held-out file."""
        return [line for _, line in read_json_lines(self.folder / HELDOUT)]

    def require_tokenizer_of(self, dense: str) -> None:
        """Check that the data were made with the tokenizer of a dense model.

        Args:
            dense: address of the dense model, see `ensure_dense`; or a NeMo or Megatron checkpoint. A checkpoint
                without a tokenizer is not compared, and a warning says so.

        Raises:
            UpcycleError: the data have another tokenizer, or the dense model cannot be read.
        """
        from nemo_upcycle.data.tokenizers import open_tokenizer, tokenizer_sha256  # slow, and not installed everywhere

        folder = _tokenizer_folder(dense)
        if folder is None:
            logger.warning("%s has no tokenizer, so it was not compared with the tokenizer of %s", dense, self.folder)
            return
        sha256 = self.manifest["tokenizer"]["sha256"]
        if sha256 != (expected := tokenizer_sha256(open_tokenizer(folder))):
            raise UpcycleError(
                f"tokenizer of {self.folder}",
                got=f"{sha256[:16]}... (sha256)",
                expected=f"{expected[:16]}..., as in the dense model {dense}",
                fix=(
                    f"run `{self.command}` with the tokenizer of the model, or start from the model that the data "
                    "were made for"
                ),
            )


@dataclass(frozen=True)
class FinishedBlend(Finished):
    """A finished folder of texts.

    Attributes:
        tokens: split (`train`, `validation`) -> source -> prefix, relative to `folder` -> number of tokens.
    """

    kind, format, key, command = "texts", FORMAT, "blend", "nemo-upcycle data"
    tokens: dict[str, dict[str, dict[str, int]]]

    @cached_property
    def shares(self) -> dict[str, float]:
        """Return each source's share of the training sequences; the shares sum to 1."""
        weights = {source: float(self.manifest["sources"][source]["weight"]) for source in self.tokens["train"]}
        return {source: weight / sum(weights.values()) for source, weight in weights.items()}

    @property
    def contamination(self) -> str:
        """Describe which evaluation items were found in the texts; empty if the texts were not searched."""
        if not (path := self.folder / CONTAMINATION).is_file():
            return ""
        content = read_json(path)
        hit_sets = {name: counts for name, counts in content["sets"].items() if counts["items_hit"]}
        words = (
            f"{counts['items_hit']} items of {name} ({counts['documents']} documents, {counts['bytes']:,} bytes)"
            for name, counts in hit_sets.items()
        )
        left = (
            f"{counts['items_hit']} items of {name} ({counts['documents']} documents)"
            for name, counts in content["report"]["sets"].items()
            if counts["items_hit"]
        )
        removed = (
            f"; removed text with {', '.join(words)}" if hit_sets else "; no evaluation item was found in the texts"
        )
        shared = f"{content['report']['words']} words in a row with"
        without = f"; not searched for: {', '.join(names)}" if (names := content.get("without")) else ""
        return f"{removed}; the remaining text shares {shared} {', '.join(left) or 'none'}{without}"

    @property
    def overlap(self) -> list[str]:
        """Describe how much held-out text is also in training text, a line for each source and split."""
        found = self.manifest.get("heldout_overlap") or {"rows": []}
        return [
            f"{row['source']}, {row['split']}: {before} of the {overlap_unit(found)}"
            f" of {row['documents']:,} documents were also in training text ({row['above']:,} had above"
            f" {100 * found['most']:g} %); {row['removed']:,} removed, {after} left"
            for row in found["rows"]
            for before, after in [overlap_shares(row)]
        ]

    @property
    def card(self) -> str:
        """Describe the data for a model card: sources, their shares and licences."""
        tokens = self.manifest["splits"]["train"]["tokens"]
        sources = (
            f"{source} ({100 * share:.3g} %; {self.manifest['sources'][source]['license']})"
            for source, share in self.shares.items()
        )
        return f"blend {self.name}, {tokens:,} tokens of text to train on: {', '.join(sources)}{self.contamination}"

    @property
    def files(self) -> list[str]:
        """List the files that trainings and evaluations read, relative to the folder."""
        prefixes = sorted(prefix for split in self.tokens for prefix in self._prefixes(split))
        return [*(f"{prefix}{end}" for prefix in prefixes for end in (".idx", ".bin")), HELDOUT]

    @property
    def held_out(self) -> dict[str, Any]:
        """Return the documents held out for evaluation, as arguments of `build_named_suite`."""
        return {"heldout_documents": self.heldout()}

    def validation_tokens(self) -> Iterator[Any]:
        """Yield the token ids of each validation document."""
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        for prefix in self._prefixes("validation"):
            dataset = IndexedDataset(str(self.folder / prefix))
            yield from (dataset[number] for number in range(len(dataset)))

    def _prefixes(self, split: str) -> list[str]:
        return [prefix for prefixes in self.tokens[split].values() for prefix in prefixes]

    def require_length(self, seq_length: int) -> None:
        """Check that every source has a training sequence, and that at least one source has a validation sequence.

        Raises:
            UpcycleError: see `paths`.
        """
        self.paths(seq_length)

    def paths(self, seq_length: int) -> dict[str, list[str]]:
        """Return `paths` for NeMo's `PreTrainingDataModule`: for each split, weights and prefixes in turn.

        Each source is given by its first prefix, from which `EpochDataset` finds the other prefixes. The entries are
        sorted by prefix, because their order affects the order of the samples. Validation omits sources shorter than a
        sequence, because Megatron would repeat their tokens to fill a sequence.

        Args:
            seq_length: tokens of a sequence.

        Raises:
            UpcycleError: a source has fewer tokens than a training sequence, or no source has a validation sequence.
        """
        for source, prefixes in self.tokens["train"].items():
            self._require_sequence(f"The train split of source {source}", sum(prefixes.values()), seq_length)
        longest = max((sum(prefixes.values()) for prefixes in self.tokens["validation"].values()), default=0)
        self._require_sequence("The longest validation source", longest, seq_length)
        train = self._weighted("train", 0)
        validation = self._weighted("validation", seq_length)
        return {"train": train, "validation": validation, "test": list(validation)}

    def _require_sequence(self, what: str, tokens: int, seq_length: int) -> None:
        if tokens <= seq_length:
            raise UpcycleError(
                f"{what} of {self.folder}",
                kind="state",
                got=f"has {tokens} tokens, but more than one sequence ({seq_length} tokens) is needed",
                fix="give the blend more text (for validation: a larger hold_out), or lower the sequence length",
            )

    def _weighted(self, split: str, longer_than: int) -> list[str]:
        weights = {
            min(prefixes): float(self.manifest["sources"][source]["weight"])
            for source, prefixes in self.tokens[split].items()
            if sum(prefixes.values()) > longer_than
        }
        return [word for prefix in sorted(weights) for word in (repr(weights[prefix]), str(self.folder / prefix))]

    def epochs(self, tokens: float) -> dict[str, float]:
        """Return, for each source, the number of epochs that a run of `tokens` tokens reads."""
        return {source: tokens * self.shares[source] / self._total(source) for source in self.shares}

    def read_too_often(self, tokens: float, also: str = "") -> Iterator[str]:
        """Yield a warning for each source that a run reads for more than `max_epochs` epochs.

        Args:
            tokens: tokens of the run.
            also: text to insert after the number of times, such as a hint that another run has read the sources, too.
        """
        limit = self.manifest["max_epochs"]
        for source, epochs in self.epochs(tokens).items():
            if epochs > limit:
                often = f"{epochs:.1f} times{also}, more often than max_epochs ({limit:g})"
                yield f"data: source {source} is read {often}: lower its weight or the number of steps"

    def _total(self, source: str) -> int:
        return sum(self.tokens["train"][source].values())

    def describe(self, steps: int, step_tokens: int) -> str:
        """Describe the tokens that a run reads from the blend, a line for each source.

        Args:
            steps: steps of the run.
            step_tokens: tokens in a step, over all ranks.
        """
        read = steps * step_tokens
        total = sum(self._total(source) for source in self.shares)
        lines = [f"data: blend {self.name}, {total:,} tokens; {steps} steps read {read:,} tokens"]
        for source, epochs in self.epochs(read).items():
            share, tokens = self.shares[source], self._total(source)
            lines.append(f"  {source}: {100 * share:.1f} % of the run, {epochs:.2f} epochs of {tokens:,} tokens")
        return "\n".join(lines)

    def heldout(self) -> list[tuple[str, str]]:
        """Return id and text of the documents held out for perplexity; an id begins with the name of the source."""
        return [
            (f"{line['source']}/{line['id']}" if "source" in line else line["id"], line["text"])
            for line in self.lines()
        ]


def percent(part: int, whole: int) -> str:
    """Return a share as text in percent.

    Example:
        >>> percent(1, 8), percent(0, 0)
        ('12.5 %', '0.0 %')
    """
    return f"{100 * part / max(whole, 1):.1f} %"


def overlap_unit(found: Mapping[str, Any]) -> str:
    """Name the unit of a manifest's `heldout_overlap`: words, or n-grams in earlier versions."""
    return str(found.get("unit") or f"{found['words']}-grams")


def overlap_shares(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the overlap in a row of `heldout_overlap` as text: before and after the removals."""
    unit = "words" if "words" in row else "ngrams"
    return percent(row["shared"], row[unit]), percent(row["shared_after"], row[f"{unit}_after"])


def open_blend(folder: str | Path) -> FinishedBlend:
    """Read the manifest of a finished folder, and compare the folder's files with the manifest.

    Only the headers of the index files are read, no tokens.

    Args:
        folder: output of `nemo-upcycle data BLEND DIR`.

    Raises:
        UpcycleError: the folder is unfinished or has another format, or a file is missing or has another size.

    Example:
        >>> open_blend("data/redpajama").paths(seq_length=8192)  # doctest: +SKIP
    """
    folder, manifest = FinishedBlend.read(folder)
    tokens = {
        split: {
            source: _measured(folder, f"The {split} split of source {source}", entry["splits"][split])
            for source, entry in sorted(manifest["sources"].items())
            if entry["splits"].get(split, {}).get("tokens")
        }
        for split in ("train", "validation")
    }
    return FinishedBlend(folder, manifest, tokens)


def _measured(folder: Path, what: str, split: dict[str, Any]) -> dict[str, int]:
    from nemo_upcycle.data.indexed_dataset import AGAIN, tokens_of  # numpy

    tokens = {prefix: tokens_of(folder / prefix) for prefix in split["prefixes"]}
    if sum(tokens.values()) != split["tokens"]:
        raise UpcycleError(
            f"{what} of {folder}",
            kind="state",
            got=f"has {sum(tokens.values())} tokens, and the manifest says {split['tokens']}",
            fix=AGAIN,
        )
    return {prefix: count for prefix, count in tokens.items() if count}


def _tokenizer_folder(dense: str) -> Path | None:
    from nemo_upcycle.sources.fetch import ensure_dense  # slow, and not installed everywhere
    from nemo_upcycle.sources.megatron_checkpoint import is_megatron

    path = Path(dense.removeprefix("nemo://"))
    if dense.startswith("nemo://") or is_megatron(path):
        own = path / "context/nemo_tokenizer"  # where NeMo 2 keeps the tokenizer
        return own if own.is_dir() else None
    return ensure_dense(dense)
