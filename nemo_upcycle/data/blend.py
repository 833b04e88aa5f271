"""The configuration of a blend: sources of training text, their shares, and how the texts are cleaned."""

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


#: The splits of a blend: for training, for the loss during training, and for evaluation afterwards.
SPLITS = ("train", "validation", "heldout")
ON_HIT = ("cut", "drop")
#: Personal data that can be replaced in texts: e-mail and IP addresses, card numbers, US social security numbers.
PII = ("email", "ip", "card", "ssn")
#: The demo's blend: State of the Union addresses.
DEMO = "sotu"
#: Maximum number of times that a run reads the demo's texts, unless the user asks for more.
MOST_EPOCHS = 100
#: Name of the only source if texts are given instead of a blend.
ONLY = "texts"
#: Maximum number of files of other kinds in a folder of texts. With more, the user probably named the wrong folder.
_MOST_OTHERS = 20_000
#: Characters that make a path a glob pattern.
GLOB = "*?["
_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")


@dataclass
class SourceConfig:
    """One source of documents; `conf/data/text.yaml` explains every key.

    Attributes:
        train: texts to train on, in the form that the reader accepts (paths, patterns, addresses, years or tasks).
        validation: documents held back for the validation loss. If `validation` and `heldout` are empty, documents are
            held back according to the blend's `hold_out`.
        heldout: documents held back for perplexity; see `validation` for an empty list.
        reader: a key of `nemo_upcycle.data.readers.READERS`.
        weight: share of the training tokens, relative to the weights of the other sources.
        tokens: maximum number of training tokens to take after all removals; None takes all.
        license: licence of the documents, for the model card.
        trains: evaluation columns for which this source contains the training questions or related questions.
        max_lost: largest share of the documents, or of their bytes, that may be unreadable; above this share, the
            build fails.
        on_hit: treatment of a document that contains an evaluation item: `cut` removes the passage, `drop` the
            document.
        options: other options of the reader.
        pii: kinds of `PII` to replace in the source's texts; None uses the blend's setting.
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
    """Shares of the documents to hold back (chosen by a hash of the id) from sources that name no held-out files."""

    validation: float = field(default=0.001, metadata=valid("0 to 0.5", lambda share: 0 <= share < 0.5))
    heldout: float = field(default=0.001, metadata=valid("0 to 0.5", lambda share: 0 <= share < 0.5))


@dataclass
class NearDuplicates:
    """Settings of MinHash: two documents are near duplicates if all hashes of one band are equal.

    Let s be the number of word n-grams that two documents have in common, divided by the number of n-grams that at
    least one of them has. The two documents are found with probability 1 - (1 - s^hashes_per_band)^bands. With the
    defaults, this probability is 0.5 at s = 0.69, 0.92 at s = 0.8, and 0.05 at s = 0.5.

    Attributes:
        bands: number of bands; the engine runs one task for each.
        hashes_per_band: hashes in a band; more hashes find fewer pairs.
        n_grams: words in an n-gram.
    """

    bands: int = field(default=14, metadata=valid("1 to 100", lambda count: 1 <= count <= 100))
    hashes_per_band: int = field(default=8, metadata=valid("1 to 100", lambda count: 1 <= count <= 100))
    n_grams: int = field(default=5, metadata=valid("1 to 100", lambda count: 1 <= count <= 100))


@dataclass
class BlendConfig:
    """A blend; `conf/data/text.yaml` explains every key.

    Attributes:
        sources: name -> source, in reading order; if texts are equal, only the first is kept.
        tokenizer: address of the dense model whose tokenizer is used.
        seq_length: tokens in a training sequence.
        max_epochs: number of epochs of a source above which a warning is shown.
        hold_out: shares to hold back from sources that name no held-out files.
        heldout_overlap: largest fraction of a held-out document's words that may be in training documents, too. Only
            sequences of 8 or more equal words count. The same limit applies to the words of a training document that
            are in held-out documents. 1 removes nothing; None skips the search.
        decontaminate: suites of `conf/evaluation` whose items must not be trained on.
        decontaminate_without: tasks of these suites to leave out of the search.
        deduplicate: whether to keep only the first of equal texts.
        near_duplicates: settings of the search for nearly equal texts. Only the first of several nearly equal texts is
            kept. None skips the search and keeps all texts.
        min_characters: length below which documents are removed (characters).
        seed: random seed for holding back documents, for sampling documents, and for the order of the training
            sequences.
        pii: kinds of `PII` to replace in the texts of sources that set no `pii` of their own.
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
    """A blend whose configuration was read and checked.

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
        """Map each suite of `decontaminate` to its configuration.

        Raises:
            UpcycleError: see `read_suite_config`.
        """
        return {name: read_suite_config(name) for name in self.config.decontaminate}


def read_blend(name: str | Path, overrides: Sequence[str] = ()) -> Blend:
    """Read and check the configuration of a blend.

    Args:
        name: name of a blend in `conf/data` (`sotu`, `fineweb_edu_academic_7_3`, ...), path of a YAML file, or texts
            as `only_source` takes them.
        overrides: settings to change, as in `sources.web.weight=0.8`.

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
    """List the patterns of the texts if `name` stands for texts; return an empty list if it names a blend.

    Args:
        name: file of texts, pattern, address, or folder; in a folder, the readable files of all kinds are used.

    Raises:
        UpcycleError: the folder has no text files, is the root folder of the machine, or contains too many files of
            other kinds.
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
            got=f"has no file in a supported text format ({readable()})",
            fix="name another folder",
        )
    return [f"{path}/**/*{end}" for end in sorted(ends)]


def no_data(why: str) -> UpcycleError:
    """Return the error for a run that names no data and may not use the demo's data.

    Args:
        why: reason, for the message.
    """
    fix = "add data=FOLDER, a finished folder of `nemo-upcycle data`; a chain also accepts a blend"
    return UpcycleError("The data", kind="missing", got=f"are missing, and {why}", fix=fix)


def is_pattern(text: str) -> bool:
    """Return whether a path is a glob pattern."""
    return any(mark in text for mark in GLOB)
