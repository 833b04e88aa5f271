"""The files that a stage writes into the run's folder, and their size."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.finished import BUILD, TOKENS
from nemo_upcycle.models.architecture import Architecture


#: Bytes per parameter of a model's folder: dense parents and exports are in BF16.
_MODEL_BYTES = 2
#: Largest vocabulary with two bytes per token of the data. With a larger vocabulary, a token takes four bytes.
_TWO_BYTE_TOKENS = 65_536


@dataclass(frozen=True)
class DiskUse:
    """Files that one stage writes into the run's folder.

    Args:
        stage: name of the stage.
        what: name of the files.
        kept_bytes: bytes that stay after the stage, without the part of unknown size.
        peak_bytes: bytes on the disk while the stage writes.
        present_bytes: bytes that exist already; `new_kept_bytes` and `new_peak_bytes` do not count them.
        unknown: name of the part whose size is unknown.
    """

    stage: str
    what: str
    kept_bytes: int
    peak_bytes: int
    present_bytes: int = 0
    unknown: str = ""

    @property
    def new_kept_bytes(self) -> int:
        """Bytes that stay and do not exist yet."""
        return max(0, self.kept_bytes - self.present_bytes)

    @property
    def new_peak_bytes(self) -> int:
        """Bytes that are on the disk while the stage writes and do not exist yet."""
        return max(0, self.peak_bytes - self.present_bytes)


def model_use(stage: str, what: str, arch: Architecture | None) -> DiskUse:
    """Return the disk use of a model's folder. If `arch` is None, its size is unknown until the parent is fetched."""
    if arch is None:
        return DiskUse(stage, what, 0, 0, unknown=what)
    size_bytes = _MODEL_BYTES * arch.total_params
    return DiskUse(stage, what, size_bytes, size_bytes)


def blend_use(stage: str, blend: Blend, arch: Architecture | None, folder: Path) -> DiskUse:
    """Return a blend's largest disk use. The size is known only for sources that are sampled to a number of tokens.

    The build merges parts into the final tokens. Parts and final tokens are both on the disk until the build ends.
    """
    sources = blend.config.sources
    token_bytes = 2 if arch and arch.vocab_size <= _TWO_BYTE_TOKENS else 4
    kept_bytes = round(sum(source.tokens or 0 for source in sources.values()) * token_bytes)
    open_ended = [name for name, source in sources.items() if source.tokens is None]
    unknown = f"data of {', '.join(open_ended)}" if open_ended else ""
    present_bytes = _size_bytes(folder / BUILD / TOKENS) + _size_bytes(folder / TOKENS)
    return DiskUse(stage, "tokens, at most", kept_bytes, 2 * kept_bytes, present_bytes, unknown)


def _size_bytes(folder: Path) -> int:
    """Return the size of a folder's files (bytes); 0 if there is no folder. A job may delete files meanwhile."""
    total_bytes = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total_bytes += path.stat().st_size
    return total_bytes
