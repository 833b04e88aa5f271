"""What a stage writes into the run's folder, and its size."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.data.blend import Blend
from nemo_upcycle.data.finished import BUILD, TOKENS
from nemo_upcycle.models.architecture import Architecture


#: Folders of models are in BF16, as the dense parents and the exports are.
_MODEL_BYTES = 2
#: Above this a token of the data takes four bytes, else two.
_TWO_BYTE_TOKENS = 65_536


@dataclass(frozen=True)
class DiskUse:
    """What one stage writes into the run's folder.

    Args:
        stage: name of the stage.
        what: name of what is written.
        kept_bytes: bytes that stay, as far as known.
        peak_bytes: bytes on the disk while it is written.
        present_bytes: bytes that are there already; neither of the other numbers counts them.
        unknown: name of the part whose size is not known.
    """

    stage: str
    what: str
    kept_bytes: int
    peak_bytes: int
    present_bytes: int = 0
    unknown: str = ""

    @property
    def new_kept_bytes(self) -> int:
        """Bytes that stay and are not there yet."""
        return max(0, self.kept_bytes - self.present_bytes)

    @property
    def new_peak_bytes(self) -> int:
        """Bytes that lie there while it is written and are not there yet."""
        return max(0, self.peak_bytes - self.present_bytes)


def model_use(stage: str, what: str, arch: Architecture | None) -> DiskUse:
    """Return the use of a folder of a model; None: not known before the parent is fetched."""
    if arch is None:
        return DiskUse(stage, what, 0, 0, unknown=what)
    size_bytes = _MODEL_BYTES * arch.total_params
    return DiskUse(stage, what, size_bytes, size_bytes)


def blend_use(stage: str, blend: Blend, arch: Architecture | None, folder: Path) -> DiskUse:
    """Bound the size of a blend, which is known of the sources that are sampled to a number of tokens.

    Its tokens are merged from parts, and both lie there until it is finished.
    """
    sources = blend.config.sources
    token_bytes = 2 if arch and arch.vocab_size <= _TWO_BYTE_TOKENS else 4
    kept_bytes = round(sum(source.tokens or 0 for source in sources.values()) * token_bytes)
    open_ended = [name for name, source in sources.items() if source.tokens is None]
    unknown = f"data of {', '.join(open_ended)}" if open_ended else ""
    present_bytes = _size_bytes(folder / BUILD / TOKENS) + _size_bytes(folder / TOKENS)
    return DiskUse(stage, "tokens, at most", kept_bytes, 2 * kept_bytes, present_bytes, unknown)


def _size_bytes(folder: Path) -> int:
    """Return the size of the files of a folder, which a job may remove meanwhile; 0 without one."""
    total_bytes = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            total_bytes += path.stat().st_size
    return total_bytes
