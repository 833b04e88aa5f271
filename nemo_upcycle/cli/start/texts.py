"""The texts to train on: their sources, an estimate of their tokens, and the share that is held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import DEMO, ONLY, Blend, only_source, read_blend
from nemo_upcycle.data.engine.encodings import COMPRESSED
from nemo_upcycle.data.engine.records import split_of
from nemo_upcycle.data.first_look import Look, check_look, filled_files, look_at
from nemo_upcycle.data.inputs import check_files
from nemo_upcycle.data.readers import readable, suffix_of
from nemo_upcycle.data.schemas import PACKED, TEXT, Schema, kept_and_lost, schema_text, split_by_field
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.console import short_count


#: Training tokens and documents of the demo's texts.
_DEMO_TOKENS, _DEMO_DOCUMENTS = 580_000, 64
#: Largest number of documents in a sample.
_SAMPLED = 2000
#: Assumed bytes per token if there is no tokenizer.
_BYTES_A_TOKEN = 4.0
#: Smallest amount to hold out: sequences for validation, and documents for each of the two splits.
_SEQUENCES, _DOCUMENTS = 2, 2
#: Shares to try, and seeds for each share. If there are few documents, a draw may hold out no document.
_SHARES, _SEEDS = (0.02, 0.05, 0.1, 0.2, 0.3), range(1234, 1274)


@dataclass(frozen=True)
class HoldOutShare:
    """The documents that are held out: the share of each split, and the seed of the draw."""

    share: float
    seed: int


@dataclass(frozen=True)
class Texts:
    """The texts of a run.

    Attributes:
        sources: name of a source -> its keys in a blend; the sources differ in the field that holds the text.
        documents: number of documents, estimated from a sample.
        tokens: number of tokens, estimated from a sample.
        described: name of a source -> text with its documents, tokens, and bytes kept and lost.
        sample: source, id and tokens of each document; None unless the sample contains all documents.
        has_splits: whether the source has its own held-out splits.
    """

    sources: dict[str, dict[str, Any]]
    documents: int
    tokens: int
    described: dict[str, str]
    sample: list[tuple[str, str, float]] | None = None
    has_splits: bool = False

    def hold_out(self, seq_length: int) -> HoldOutShare | None:
        """Choose a share that is large enough for validation and for the bits per byte of held-out text.

        Args:
            seq_length: tokens per sequence.

        Returns:
            The share and the seed; None if the source has its own splits.

        Raises:
            UpcycleError: there are too few documents.
        """
        if self.has_splits:
            return None
        if self.sample is None:
            share = max(50 / self.documents, 8 * seq_length / self.tokens, 0.001)
            return HoldOutShare(min(round(share, 4), _SHARES[-1]), _SEEDS[0])
        for share, seed in ((share, seed) for share in _SHARES for seed in _SEEDS):
            tokens, documents = Counter[tuple[str, str]](), Counter[str]()
            for source, identity, size in self.sample:
                split = split_of(identity, seed, {"validation": share, "heldout": share})
                tokens[split, source] += int(size)
                documents[split] += 1
            trained = min(tokens["train", source] for source in self.sources)
            watched = max(tokens["validation", source] for source in self.sources)
            least = min(_DOCUMENTS, len(self.sample) // 3)
            enough = min(documents["validation"], documents["heldout"]) >= max(1, least)
            if enough and min(watched, trained) > _SEQUENCES * seq_length:
                return HoldOutShare(share, seed)
        raise UpcycleError(
            "The texts",
            kind="state",
            got=(
                f"have {len(self.sample):,} documents, about {self.tokens:,} tokens; a run needs more than "
                f"{_SEQUENCES} sequences of {seq_length:,} tokens, and some documents to hold out"
            ),
            fix="give more texts, or cut long ones into several documents",
        )


def find_texts(name: str | None, tokenizer: Path | None) -> Texts:
    """Find texts and read a sample of them.

    Args:
        name: a file, a folder or a pattern; None means the demo's texts.
        tokenizer: folder with a `tokenizer.json`, for counting tokens; None estimates tokens from bytes.

    Raises:
        UpcycleError: there are no files, or they contain no text.
    """
    if name is None:
        config = read_blend(DEMO).config.sources["speeches"]
        source = {key: getattr(config, key) for key in ("reader", "license", "train", "validation", "heldout")}
        about = f"the demo's, {_DEMO_DOCUMENTS} speeches, about {short_count(_DEMO_TOKENS)} tokens"
        return Texts({ONLY: source}, _DEMO_DOCUMENTS, _DEMO_TOKENS, {ONLY: about}, has_splits=True)
    if not only_source(name):
        got = "have no file in a supported format" if Path(name).exists() else "do not exist"
        fix = "give a file, a folder, or a pattern in quotes"
        raise UpcycleError(f"Texts {name}", kind="state", got=got, fix=f"{fix} ({readable()})")
    files = check_files(blend := read_blend(name), ONLY)["train"]
    filled_files(ONLY, files)
    blend, schemas = split_by_field(blend, ONLY, files)
    own = tokenizer / "tokenizer.json" if tokenizer else None
    found = [_read(blend, source, own if own and own.is_file() else None, schemas) for source in blend.config.sources]
    samples = [one.sample for one in found]
    whole = None if None in samples else [part for sample in samples for part in sample or ()]
    total = sum(one.tokens for one in found)
    keys = {key: value for one in found for key, value in one.sources.items()}
    if len(found) > 1:  # weights in proportion to the tokens, so that every text is read equally often
        shares = {key: round(one.tokens / total, 4) for one in found for key in one.sources}
        keys = {key: value | {"weight": shares[key]} for key, value in keys.items()}
    lines = {key: value for one in found for key, value in one.described.items()}
    return Texts(keys, sum(one.documents for one in found), total, lines, whole)


def _read(blend: Blend, source: str, tokenizer: Path | None, schemas: Sequence[Schema]) -> Texts:
    """Read a sample of one source, and estimate the size of the source."""
    files, config = check_files(blend, source)["train"], blend.config.sources[source]
    look = look_at(files, documents=_SAMPLED, tokenizer=tokenizer)
    check_look(blend, source, look)
    sizes = [file.size_bytes or 0 for file in files]
    rate = look.tokens_per_byte or 1 / _BYTES_A_TOKEN
    is_whole = len(look.read_bytes) == len(files) and look.read_bytes[-1] is None
    sampled = sum(size for _, size in look.documents)
    text_bytes = sampled if is_whole else sampled * _growth(look, sizes, [file.path for file in files])
    documents = round(len(look.documents) * text_bytes / sampled)
    about = "" if is_whole else "about "
    rows = kept_and_lost(files, schemas, config.options.get("text_key", TEXT))
    schema = "; ".join(map(schema_text, rows)) or ", ".join(
        f"{count:,} {end}" for end, count in Counter(suffix_of(file.path) for file in files).items()
    )
    return Texts(
        {source: {"train": config.train} | ({"options": config.options} if config.options else {})},
        documents,
        max(1, round(text_bytes * rate)),
        {source: f"{about}{documents:,} documents, about {short_count(text_bytes * rate)} tokens; {schema}"},
        [(source, identity, size * rate) for identity, size in look.documents] if is_whole else None,
    )


def _growth(look: Look, sizes: list[int], paths: list[str]) -> float:
    """Estimate the text bytes of all files, as a multiple of the text bytes in the sample."""

    def read() -> Iterator[float]:
        for size, path, read_bytes in zip(sizes, paths, look.read_bytes, strict=False):
            packed = PACKED if path.endswith((*COMPRESSED, ".parquet")) else 1.0
            yield size if read_bytes is None else min(size, read_bytes / packed)

    return max(1.0, sum(sizes) / max(1.0, sum(read())))
