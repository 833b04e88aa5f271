"""The texts that a run trains on: what they are, about how many tokens, and what is held back of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import DEMO, ONLY, only_source, read_blend
from nemo_upcycle.data.engine.encodings import COMPRESSED
from nemo_upcycle.data.engine.records import split_of
from nemo_upcycle.data.first_look import Look, check_look, filled_files, look_at, reading
from nemo_upcycle.data.inputs import check_files
from nemo_upcycle.data.readers import readable, suffix_of
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.console import short_count


#: Tokens that the demo's texts have to train on, and documents.
_DEMO_TOKENS, _DEMO_DOCUMENTS = 580_000, 64
#: Of a sample: documents at most.
_SAMPLED = 2000
#: Bytes of text for a stored one, of files that no sample has read to their end: compressed, Parquet.
_PACKED = 2.5
#: Bytes of a token where no tokenizer is at hand.
_BYTES_A_TOKEN = 4.0
#: Held back at least, for each of the two splits: sequences of validation, and documents.
_SEQUENCES, _DOCUMENTS = 2, 2
#: Shares that are tried, and seeds for each: of few documents a draw may hold back none.
_SHARES, _SEEDS = (0.02, 0.05, 0.1, 0.2, 0.3), range(1234, 1274)


@dataclass(frozen=True)
class HoldOutShare:
    """What is held back of the documents: the share of each split, and the seed of the draw."""

    share: float
    seed: int


@dataclass(frozen=True)
class Texts:
    """The texts of a run.

    Attributes:
        source: its keys in a blend.
        documents: their number, from the sample.
        tokens: their number, from the sample.
        description: what was found.
        sample: id and tokens of each document, where the sample has read all.
        has_splits: whether the source names what is held back itself.
    """

    source: dict[str, Any]
    documents: int
    tokens: int
    description: str
    sample: list[tuple[str, float]] | None = None
    has_splits: bool = False

    def hold_out(self, seq_length: int) -> HoldOutShare | None:
        """Choose what is held back, enough for a validation and for the bits per byte of held-out text.

        Args:
            seq_length: tokens of a sequence.

        Returns:
            None: the source has splits of its own.

        Raises:
            UpcycleError: there are too few documents.
        """
        if self.has_splits:
            return None
        if self.sample is None:
            share = max(50 / self.documents, 8 * seq_length / self.tokens, 0.001)
            return HoldOutShare(min(round(share, 4), _SHARES[-1]), _SEEDS[0])
        for share, seed in ((share, seed) for share in _SHARES for seed in _SEEDS):
            tokens, documents = Counter[str](), Counter[str]()
            for identity, size in self.sample:
                split = split_of(identity, seed, {"validation": share, "heldout": share})
                tokens[split] += int(size)
                documents[split] += 1
            least = min(_DOCUMENTS, len(self.sample) // 3)
            enough = min(documents["validation"], documents["heldout"]) >= max(1, least)
            if enough and min(tokens["validation"], tokens["train"]) > _SEQUENCES * seq_length:
                return HoldOutShare(share, seed)
        raise UpcycleError(
            "texts",
            got=f"{len(self.sample):,} documents, about {self.tokens:,} tokens",
            expected=f"enough to hold some back, and more than {_SEQUENCES} sequences of {seq_length:,} tokens",
            fix="give more texts, or cut long ones into several documents",
        )


def find_texts(name: str | None, tokenizer: Path | None) -> Texts:
    """Find texts and read a sample of them.

    Args:
        name: a file, a folder, a pattern; None: the demo's.
        tokenizer: folder with a `tokenizer.json`, to estimate tokens by; None estimates by bytes.

    Raises:
        UpcycleError: there are none, or they have no text.
    """
    if name is None:
        config = read_blend(DEMO).config.sources["speeches"]
        source = {key: getattr(config, key) for key in ("reader", "license", "train", "validation", "heldout")}
        about = f"the demo's, {_DEMO_DOCUMENTS} speeches, about {short_count(_DEMO_TOKENS)} tokens"
        return Texts(source, _DEMO_DOCUMENTS, _DEMO_TOKENS, about, has_splits=True)
    if not only_source(name):
        got = "no file of texts" if Path(name).exists() else "no such file or folder"
        fix = "give a file, a folder, or a pattern in quotes"
        raise UpcycleError(f"texts {name}", got=got, expected=readable(), fix=fix)
    blend = read_blend(name)
    files = check_files(blend, ONLY)["train"]
    filled_files(ONLY, files)
    own = tokenizer / "tokenizer.json" if tokenizer else None
    sample: dict[str, Any] = {"documents": _SAMPLED, "tokenizer": own if own and own.is_file() else None}
    look = look_at(files, **sample)
    if field := look.text_field:
        blend = reading(blend, ONLY, field)
        files = check_files(blend, ONLY)["train"]
        look = look_at(files, **sample)
    check_look(blend, ONLY, look)
    config = blend.config.sources[ONLY]
    sizes = [file.size_bytes or 0 for file in files]
    rate = look.tokens_per_byte or 1 / _BYTES_A_TOKEN
    is_whole = len(look.read_bytes) == len(files) and look.read_bytes[-1] is None
    sampled = sum(size for _, size in look.documents)
    text_bytes = sampled if is_whole else sampled * _growth(look, sizes, [file.path for file in files])
    documents = round(len(look.documents) * text_bytes / sampled)
    about = "" if is_whole else "about "
    kinds = Counter(suffix_of(file.path) for file in files)
    described = ", ".join(f"{count:,} {end}" for end, count in kinds.items())
    where = f", in their field `{field}`" if field else ""
    return Texts(
        {"train": config.train, **({"options": config.options} if config.options else {})},
        documents,
        max(1, round(text_bytes * rate)),
        f"{described}: {about}{documents:,} documents, about {short_count(text_bytes * rate)} tokens{where}",
        [(identity, size * rate) for identity, size in look.documents] if is_whole else None,
    )


def _growth(look: Look, sizes: list[int], paths: list[str]) -> float:
    """Estimate how many times the bytes of text of the sample all files have."""

    def read() -> Iterator[float]:
        for size, path, read_bytes in zip(sizes, paths, look.read_bytes, strict=False):
            packed = _PACKED if path.endswith((*COMPRESSED, ".parquet")) else 1.0
            yield size if read_bytes is None else min(size, read_bytes / packed)

    return max(1.0, sum(sizes) / max(1.0, sum(read())))
