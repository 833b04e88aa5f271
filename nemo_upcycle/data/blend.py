"""What a blend is: the sources of the training data, their shares, and how they are cleaned."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_upcycle.data.suites.suite_config import SuiteConfig, read_suite_config
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.conf import Conf, as_dataclass, overridden, packaged_names, read_conf
from nemo_upcycle.utils.validation import one_of, valid


#: The splits of a blend: trained on, watched during training, and measured afterwards.
SPLITS = ("train", "validation", "heldout")
ON_HIT = ("cut", "drop")
#: What can be replaced in texts: e-mail and IP addresses, numbers of cards and of the USA's social security.
PII = ("email", "ip", "card", "ssn")
#: The blend of the demo: some speeches.
DEMO = "sotu"
#: How often a training may read its texts unless the user says otherwise.
MOST_EPOCHS = 100
#: The one source of texts that are given in place of a blend.
ONLY = "texts"
#: Files of other kinds in a folder of texts; with more, another folder was named by mistake.
_MOST_OTHERS = 20_000
#: What makes a path a pattern.
GLOB = "*?["
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass
class SourceConfig:
    """One source of documents; `conf/data/text.yaml` explains every key.

    Attributes:
        train: what is trained on: paths, patterns and addresses, years or tasks, as the reader takes them.
        validation: documents held back for the loss that is watched; empty leaves it to the blend's `hold_out`.
        heldout: documents held back for perplexity, as validation.
        reader: a key of `nemo_upcycle.data.readers.READERS`.
        weight: share of the training tokens, relative to the other sources'.
        tokens: most tokens to take for training, of what the removals leave; None takes all.
        license: licence of the documents, for the model card.
        trains: columns of an evaluation whose training split, or kin of it, is in here.
        max_lost: largest share of its documents, or of their bytes, that may be unreadable; above it no blend is made.
        on_hit: what happens to a document that holds an evaluation item: its passage is cut out, or all is dropped.
        options: further options of the reader.
        pii: what is replaced in its texts, of `PII`; None leaves it to the blend.
    """

    train: list[str] = field(metadata=valid("at least one entry", len))
    validation: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    reader: str = "files"
    weight: float = field(default=1.0, metadata=valid("more than 0", lambda weight: 0 < weight < math.inf))
    tokens: float | None = field(default=None, metadata=valid("1 or more", lambda most: 1 <= most < math.inf))
    license: str = "not stated"
    trains: list[str] = field(default_factory=list)
    max_lost: float = field(default=0.1, metadata=valid("0 to 1", lambda share: 0 <= share <= 1))
    on_hit: str = field(default="cut", metadata=one_of(ON_HIT))
    options: dict[str, Any] = field(default_factory=dict)
    pii: list[str] | None = field(default=None, metadata=one_of(PII))


@dataclass
class HoldOut:
    """Shares of the documents of sources without splits of their own that are held back, by a hash of their id."""

    validation: float = field(default=0.001, metadata=valid("0 to 0.5", lambda share: 0 <= share < 0.5))
    heldout: float = field(default=0.001, metadata=valid("0 to 0.5", lambda share: 0 <= share < 0.5))


@dataclass
class NearDuplicates:
    """MinHash: documents that have all hashes of one band in common are near duplicates.

    Two documents that share a part s of their n-grams of words (of all that either has) are found with a probability
    of 1 - (1 - s^hashes_per_band)^bands: with these values 0.5 at s = 0.69, 0.92 at 0.8, 0.05 at 0.5.

    Attributes:
        bands: tasks that look for pairs, too.
        hashes_per_band: more hashes find fewer pairs.
        n_grams: words of an n-gram.
    """

    bands: int = field(default=14, metadata=valid("1 to 100", lambda count: 1 <= count <= 100))
    hashes_per_band: int = field(default=8, metadata=valid("1 to 100", lambda count: 1 <= count <= 100))
    n_grams: int = field(default=5, metadata=valid("1 to 100", lambda count: 1 <= count <= 100))


@dataclass
class BlendConfig:
    """A blend; `conf/data/text.yaml` explains every key.

    Attributes:
        sources: name -> source, in the order in which they are read; of equal texts the first one stays.
        tokenizer: the dense model whose tokenizer is used, by address.
        seq_length: tokens of a training sequence.
        max_epochs: above this a source is warned about.
        hold_out: what is held back of sources without splits of their own.
        heldout_overlap: the largest part of its words that a held-out document may share with the training
            documents, or one of these with the held-out documents, in rows of 8 or more; 1 removes none, None does not
            look.
        decontaminate: suites of `conf/evaluation` whose items must not be trained on.
        decontaminate_without: tasks of those suites that are not looked for.
        deduplicate: whether equal texts are kept once.
        near_duplicates: how nearly equal texts are found, of which the first stays; None keeps them.
        min_characters: shorter documents are removed.
        seed: seed of all that is drawn: documents held back and sampled, and the order.
        pii: what is replaced in the texts of sources that do not say so themselves.
    """

    sources: dict[str, SourceConfig] = field(metadata=valid("at least one", len))
    tokenizer: str | None = None
    seq_length: int = field(default=8192, metadata=valid("2 or more", lambda tokens: tokens >= 2))
    max_epochs: float = field(default=4.0, metadata=valid("more than 0", lambda epochs: epochs > 0))
    hold_out: HoldOut = field(default_factory=HoldOut)
    heldout_overlap: float | None = field(default=0.5, metadata=valid("0 to 1", lambda part: 0 <= part <= 1))
    decontaminate: list[str] = field(default_factory=list)
    decontaminate_without: list[str] = field(default_factory=list)
    deduplicate: bool = True
    near_duplicates: NearDuplicates | None = None
    min_characters: int = field(default=1, metadata=valid("0 or more", lambda characters: characters >= 0))
    seed: int = field(default=1234, metadata=valid("0 or more", lambda seed: seed >= 0))
    pii: list[str] = field(default_factory=list, metadata=one_of(PII))


@dataclass(frozen=True)
class Blend:
    """A blend that was read and checked.

    Attributes:
        name: name of its file, without suffix.
        folder: folder that relative paths start from.
        config: content of the file.
    """

    name: str
    folder: Path
    config: BlendConfig

    def share(self, source: str) -> float:
        """Return a source's share of the training tokens, 0 to 1."""
        return self.config.sources[source].weight / sum(one.weight for one in self.config.sources.values())

    @cached_property
    def suites(self) -> dict[str, SuiteConfig]:
        """Suite of `decontaminate` -> its configuration.

        Raises:
            UpcycleError: see `read_suite_config`.
        """
        return {name: read_suite_config(name) for name in self.config.decontaminate}


def read_blend(name: str | Path, overrides: Sequence[str] = ()) -> Blend:
    """Read a blend.

    Args:
        name: one of the package's own in `conf/data` (`sotu`, `fineweb_edu_academic_7_3`, ...), a YAML file, or texts,
            see `only_source`.
        overrides: `key=value`, as in `sources.web.weight=0.8`.

    Raises:
        UpcycleError: there is no such blend, or a key or value is wrong.

    Example:
        >>> read_blend("sotu").config.sources["speeches"].reader
        'sotu'
    """
    path = Path(name).expanduser().absolute()
    entries = only_source(name)
    alone = {"sources": {ONLY: {"train": entries}}}
    conf = Conf(alone, path, path.parent) if entries else read_conf("data", name, "blend")
    known = conf.content.get("sources")
    for override in overrides:
        named = re.match(r"sources\.([^.=]+)", override)
        if named and isinstance(known, dict) and named[1] not in known:
            raise UpcycleError.unknown(f"{conf.path}: source", named[1], known)
    config = as_dataclass(str(conf.path), overridden(conf, overrides), BlendConfig, "data")
    for name in config.sources:
        if not _NAME.fullmatch(name):
            expected = "lower-case letters, digits and _"
            raise UpcycleError(f"{conf.path}: sources", got=repr(name), expected=expected, fix="rename the source")
    if config.near_duplicates and not config.deduplicate:
        fix = "set deduplicate=true, or near_duplicates=null"
        raise UpcycleError(f"{conf.path}: near_duplicates", kind="refused", got="needs deduplicate: true", fix=fix)
    file = conf.path if not is_pattern(conf.path.name) else conf.path.parent
    return Blend(file.stem, conf.folder, config)


def only_source(name: str | Path) -> list[str]:
    """List the patterns of texts that are named in place of a blend; none where a blend is named.

    Args:
        name: a file of texts, a pattern or address of some, or a folder, whose files of all kinds are read.

    Raises:
        UpcycleError: a folder has no text files, or is the root or another folder of mostly other files.
    """
    from nemo_upcycle.data.readers import format_of, readable, suffix_of  # slow

    text, path = str(name), Path(name).expanduser().absolute()
    if path.suffix in (".yaml", ".yml") or text in packaged_names("data"):
        return []
    if not path.is_dir():
        return [text if "://" in text else str(path)] if format_of(text) or is_pattern(text) else []
    ends, others = set[str](), 0
    for _, _, files in os.walk(path, followlinks=True):
        ends.update(map(suffix_of, files))
        others += sum(not suffix_of(file) for file in files)
        is_root = path == Path(path.anchor)
        if others > _MOST_OTHERS or is_root:
            got = "is the root of this machine" if is_root else f"has over {_MOST_OTHERS:,} files of other kinds"
            fix = "name a folder that holds only the texts"
            raise UpcycleError(f"Folder {path}", kind="refused", got=got, fix=fix)
    ends.discard("")
    if not ends:
        raise UpcycleError(
            f"Folder {path}",
            kind="missing",
            got=f"has no file of texts that is read ({readable()})",
            fix="name another folder",
        )
    return [f"{path}/**/*{end}" for end in sorted(ends)]


def no_data(why: str) -> UpcycleError:
    """Return the error for a training that names no data and may not read the demo's.

    Args:
        why: the reason, for the text.
    """
    fix = "add data=FOLDER, a finished folder of `nemo-upcycle data`; a chain takes a blend as well"
    return UpcycleError("The data", kind="missing", got=f"are missing, and {why}", fix=fix)


def is_pattern(text: str) -> bool:
    """Return whether a path stands for all that it matches."""
    return any(mark in text for mark in GLOB)
