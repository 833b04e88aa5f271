"""Read a finished folder of `nemo-upcycle data`: what can be trained on, in which shares, and whether it is whole."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_upcycle.data.indexed_dataset import HEADER, MAGIC, TOKEN_BYTES
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, read_json_lines, require_complete, resolved
from nemo_upcycle.utils.schema import require_known


logger = logging.getLogger(__name__)
#: Of the manifest; and what the folder holds.
FORMAT = 2
BUILD = "build"
MANIFEST, CONTAMINATION, HELDOUT, TOKENIZER, TOKENS = (
    "manifest.json",
    "contamination.json",
    "heldout.jsonl",
    "tokenizer",
    "tokens",
)
#: What `nemo_upcycle.data.engine.heldout` counts, in the folder `build`, until the build is finished.
HELDOUT_OVERLAP = "overlap/summary.json"
_AGAIN = "copy the folder again, or delete it and run `nemo-upcycle data BLEND DIR` again"


@dataclass(frozen=True)
class FinishedBlend:
    """A finished folder and its manifest.

    Attributes:
        folder: absolute, without links: Megatron names its indices after the paths of the data.
        manifest: as `nemo-upcycle data` writes it.
        tokens: by split (`train`, `validation`) and source, the tokens of each prefix, relative to `folder`.
    """

    folder: Path
    manifest: dict[str, Any]
    tokens: dict[str, dict[str, dict[str, int]]]

    @property
    def name(self) -> str:
        """Return the name of the blend."""
        return str(self.manifest["blend"])

    @cached_property
    def shares(self) -> dict[str, float]:
        """Return the share that each source has in the training sequences; together they are 1."""
        weights = {source: float(self.manifest["sources"][source]["weight"]) for source in self.tokens["train"]}
        return {source: weight / sum(weights.values()) for source, weight in weights.items()}

    @property
    def identity(self) -> str:
        """Return a hash of what a training or an evaluation reads: the same for the same texts, tokens and shares.

        Paths and times of files, licences, and the versions that made the folder are no part of it.
        """
        sources: dict[str, Any] = {}
        for name, share in self.shares.items():
            source = self.manifest["sources"][name]
            texts = [file["texts_xxh3_128"] for file in source.get("files", {}).values()]
            sources[name] = [share, texts, *(source.get(key) for key in ("splits", "steps", "pii"))]
        content = [self.manifest["seed"], self.manifest["tokenizer"]["sha256"], self.manifest["splits"], sources]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def contamination(self) -> str:
        """Say which evaluation items were found in the texts; empty where none were looked for."""
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
        removed = f"; removed text with {', '.join(words)}" if hit_sets else "; no evaluation item was found in it"
        shared = f"{content['report']['words']} words in a row with"
        without = f"; not looked for: {', '.join(names)}" if (names := content.get("without")) else ""
        return f"{removed}; what is left shares {shared} {', '.join(left) or 'none'}{without}"

    @property
    def overlap(self) -> list[str]:
        """Say how much of its held-out text stands in training text, a line for each source and split."""
        found = self.manifest.get("heldout_overlap") or {"rows": []}
        return [
            f"{row['source']}, {row['split']}: {before} of the {overlap_unit(found)}"
            f" of {row['documents']:,} documents stood in training text ({row['above']:,} had above"
            f" {100 * found['most']:g} %); {row['removed']:,} removed, {after} left"
            for row in found["rows"]
            for before, after in [overlap_shares(row)]
        ]

    @property
    def card(self) -> str:
        """Return what a model card says of the data: sources, their shares and licences."""
        tokens = self.manifest["splits"]["train"]["tokens"]
        sources = (
            f"{source} ({100 * share:.3g} %; {self.manifest['sources'][source]['license']})"
            for source, share in self.shares.items()
        )
        return f"blend {self.name}, {tokens:,} tokens of text to train on: {', '.join(sources)}{self.contamination}"

    def paths(self, seq_length: int) -> dict[str, list[str]]:
        """Return `paths` of NeMo's `PreTrainingDataModule`: by split, weights and prefixes in turn, sorted by prefix.

        A source stands there with its first prefix, as `EpochDataset` takes it. The order of the prefixes is part of
        the order of the samples. In validation, sources of less than a sequence are omitted: they would be repeated to
        fill it.

        Args:
            seq_length: tokens of a sequence.

        Raises:
            UpcycleError: a source has not one sequence to train on, or none has one to validate on.
        """
        for source, prefixes in self.tokens["train"].items():
            self._require_sequence(f"tokens of source {source} to train on", sum(prefixes.values()), seq_length)
        longest = max((sum(prefixes.values()) for prefixes in self.tokens["validation"].values()), default=0)
        self._require_sequence("tokens of the longest validation source", longest, seq_length)
        train = self._weighted("train", 0)
        validation = self._weighted("validation", seq_length)
        return {"train": train, "validation": validation, "test": list(validation)}

    def _require_sequence(self, what: str, tokens: int, seq_length: int) -> None:
        if tokens <= seq_length:
            raise UpcycleError(
                f"{what} in {self.folder}",
                got=tokens,
                expected=f"more than one sequence ({seq_length})",
                fix="give the blend more text (of validation, a larger hold_out), or lower the length of a sequence",
            )

    def _weighted(self, split: str, longer_than: int) -> list[str]:
        weights = {
            min(prefixes): float(self.manifest["sources"][source]["weight"])
            for source, prefixes in self.tokens[split].items()
            if sum(prefixes.values()) > longer_than
        }
        return [word for prefix in sorted(weights) for word in (repr(weights[prefix]), str(self.folder / prefix))]

    def epochs(self, tokens: float) -> dict[str, float]:
        """Return how often each source is read in a run of that many tokens."""
        return {source: tokens * self.shares[source] / self._total(source) for source in self.shares}

    def _total(self, source: str) -> int:
        return sum(self.tokens["train"][source].values())

    def describe(self, steps: int, step_tokens: int) -> str:
        """Return what a run reads of the blend, a line for each source.

        Args:
            steps: of the run.
            step_tokens: tokens of a step, over all ranks.
        """
        read = steps * step_tokens
        total = sum(self._total(source) for source in self.shares)
        lines = [f"data: blend {self.name}, {total:,} tokens; {steps} steps read {read:,} tokens"]
        for source, epochs in self.epochs(read).items():
            share, tokens = self.shares[source], self._total(source)
            lines.append(f"  {source}: {100 * share:.1f} % of the run, {epochs:.2f} epochs of {tokens:,} tokens")
        return "\n".join(lines)

    def heldout(self) -> list[tuple[str, str]]:
        """Return id and text of the documents that were held out for perplexity; an id begins with its source."""
        lines = [line for _, line in read_json_lines(self.folder / HELDOUT)]
        return [(f"{line['source']}/{line['id']}" if "source" in line else line["id"], line["text"]) for line in lines]

    def require_tokenizer_of(self, dense: str) -> None:
        """Check that the data were made with the tokenizer of a dense model.

        Args:
            dense: as in `ensure_dense`, or a NeMo or Megatron checkpoint; of one that holds no tokenizer, a message
                says that it was not compared.

        Raises:
            UpcycleError: they were not, or the dense model cannot be read.
        """
        require_same_tokenizer(self.folder, self.manifest["tokenizer"]["sha256"], dense, "nemo-upcycle data")


def require_same_tokenizer(data: Path, sha256: str, dense: str, command: str) -> None:
    """Check that a folder of data was made with the tokenizer of a dense model.

    Args:
        data: the folder.
        sha256: of its tokenizer, as its manifest says.
        dense: as in `FinishedBlend.require_tokenizer_of`.
        command: that makes such a folder.

    Raises:
        UpcycleError: it was not, or the dense model cannot be read.
    """
    from nemo_upcycle.data.tokenizers import open_tokenizer, tokenizer_sha256  # slow, and not installed everywhere

    folder = _tokenizer_folder(dense)
    if folder is None:
        logger.warning("%s holds no tokenizer: not compared with that of %s", dense, data)
        return
    if sha256 != (expected := tokenizer_sha256(open_tokenizer(folder))):
        raise UpcycleError(
            f"tokenizer of {data}",
            got=f"sha256 {sha256[:16]}...",
            expected=f"that of the dense model {dense}, {expected[:16]}...",
            fix=f"run `{command}` with the tokenizer of the model, or start from the model of the data",
        )


def percent(part: int, whole: int) -> str:
    """Return a share for reading.

    Example:
        >>> percent(1, 8), percent(0, 0)
        ('12.5 %', '0.0 %')
    """
    return f"{100 * part / max(whole, 1):.1f} %"


def overlap_unit(found: Mapping[str, Any]) -> str:
    """Name the unit of a manifest's `heldout_overlap`: words, or n-grams in earlier versions."""
    return str(found.get("unit") or f"{found['words']}-grams")


def overlap_shares(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the shares before and after the removals of a row of `heldout_overlap`."""
    unit = "words" if "words" in row else "ngrams"
    return percent(row["shared"], row[unit]), percent(row["shared_after"], row[f"{unit}_after"])


def open_blend(folder: str | Path) -> FinishedBlend:
    """Read the manifest of a finished folder and check its files against it.

    Reads the headers of the index files, and no token.

    Args:
        folder: the output of `nemo-upcycle data BLEND DIR`.

    Raises:
        UpcycleError: the folder is not finished, of another format, or a file is missing or of another size.

    Example:
        >>> open_blend("data/redpajama").paths(seq_length=8192)  # doctest: +SKIP
    """
    folder = resolved(Path(folder).expanduser())
    require_complete(folder, "data folder", "run `nemo-upcycle data BLEND DIR` with it as DIR")
    manifest = read_json(folder / MANIFEST)
    require_known(manifest, folder / MANIFEST)
    version = manifest.get("format") if isinstance(manifest, dict) else "no JSON object"
    if version != FORMAT:
        raise UpcycleError(
            f"format of {folder / MANIFEST}",
            got=version,
            expected=FORMAT,
            fix="make the folder with `nemo-upcycle data` of this version",
        )
    tokens = {
        split: {
            source: _measured(folder, f"source {source}, {split}", entry["splits"][split])
            for source, entry in sorted(manifest["sources"].items())
            if entry["splits"].get(split, {}).get("tokens")
        }
        for split in ("train", "validation")
    }
    return FinishedBlend(folder, manifest, tokens)


def _measured(folder: Path, what: str, split: dict[str, Any]) -> dict[str, int]:
    tokens = {prefix: tokens_of(folder / prefix) for prefix in split["prefixes"]}
    if sum(tokens.values()) != split["tokens"]:
        raise UpcycleError(
            f"tokens of {what} in {folder}", got=sum(tokens.values()), expected=split["tokens"], fix=_AGAIN
        )
    return {prefix: count for prefix, count in tokens.items() if count}


def tokens_of(prefix: Path) -> int:
    """Return the tokens of an indexed dataset, by its path without suffix.

    Raises:
        UpcycleError: one of its two files has not the size that it states.
    """
    index, data = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    _require_size(index, HEADER.size, at_least=True)
    with index.open("rb") as handle:
        magic, _, code, sequences, documents = HEADER.unpack(handle.read(HEADER.size))
        if magic != MAGIC or code not in TOKEN_BYTES:
            raise UpcycleError(str(index), got="other bytes", expected="an index of Megatron's", fix=_AGAIN)
        _require_size(index, HEADER.size + 12 * sequences + 8 * documents)
        if not sequences:
            return 0
        # Lengths in tokens, 4 bytes each, then where each sequence begins, 8 bytes each.
        handle.seek(HEADER.size + 4 * (sequences - 1))
        (length,) = struct.unpack("<i", handle.read(4))
        handle.seek(HEADER.size + 4 * sequences + 8 * (sequences - 1))
        (start,) = struct.unpack("<q", handle.read(8))
    size_bytes = start + length * TOKEN_BYTES[code]
    _require_size(data, size_bytes)
    return size_bytes // TOKEN_BYTES[code]


def _require_size(path: Path, size_bytes: int, *, at_least: bool = False) -> None:
    actual_bytes = path.stat().st_size if path.is_file() else None
    if actual_bytes is None or actual_bytes < size_bytes or (actual_bytes > size_bytes and not at_least):
        raise UpcycleError(
            str(path),
            got="no such file" if actual_bytes is None else f"{actual_bytes} bytes",
            expected=f"{size_bytes} bytes{' or more' if at_least else ''}",
            fix=_AGAIN,
        )


def _tokenizer_folder(dense: str) -> Path | None:
    from nemo_upcycle.data.dense import ensure_dense  # slow, and not installed everywhere
    from nemo_upcycle.sources.megatron_checkpoint import is_megatron

    path = Path(dense.removeprefix("nemo://"))
    if dense.startswith("nemo://") or is_megatron(path):
        own = path / "context/nemo_tokenizer"  # where NeMo 2 keeps it
        return own if own.is_dir() else None
    return ensure_dense(dense)
