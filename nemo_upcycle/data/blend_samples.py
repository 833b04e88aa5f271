"""The samples that a run of NeMo or Megatron-Bridge reads from a finished blend, and their order.

Megatron's datasets write the order of their samples as .npy files, named after a hash of the data's path, the number
of samples, the seed and the sequence length. Megatron writes these files in place and never checks existing ones. So
Megatron would read a truncated file, or a file for older data under the same path. `whole_indices` lets one process at
a time build the files, and deletes the files that a killed process left.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nemo_upcycle.data.blend import MOST_EPOCHS, no_data
from nemo_upcycle.data.finished import MANIFEST, FinishedBlend
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MARKER, is_complete, read_json, sha256_file, write_json
from nemo_upcycle.utils.locks import take_lock
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.ranks import is_first_rank


logger = logging.getLogger(__name__)
#: Folder inside the blend's folder where Megatron stores the order of the samples.
INDICES = "indices"
_LOCK = ".lock"
#: Names of the index files. All other files in the folder are left alone.
_INDEX = re.compile(r"[0-9a-f]{32}-\w+-(train|valid|test)-\w+\.(npy|txt)")


def index_folder(blend: FinishedBlend, indices: str | None) -> Path:
    """Return the folder where Megatron stores the order of a blend's samples.

    If `indices` is None, the folder is inside the blend's folder. Otherwise it is inside `indices`, which several
    blends may share.
    """
    if not indices:
        return blend.folder / INDICES
    return Path(indices).absolute() / sha256_file(blend.folder / MANIFEST)[:16]


@contextmanager
def whole_indices(cache: Path, manifest: Path) -> Iterator[None]:
    """Delete index files that may be incomplete, run the block that builds them, and record the files.

    Only the first rank calls this function. Megatron makes the other ranks wait.

    Args:
        cache: folder of the index files; its marker lists the files and their sizes.
        manifest: manifest of the data; index files that were built for another manifest are deleted.

    Raises:
        UpcycleError: the folder cannot be written.

    Example:
        >>> with whole_indices(folder / "indices", folder / "manifest.json"):  # doctest: +SKIP
        ...     datamodule.build(...)
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = take_lock(cache / _LOCK)
    except TimeoutError:
        logger.info("waiting for another run that builds the indices in %s", cache)
        lock = take_lock(cache / _LOCK, timeout_s=-1)
    except OSError as error:
        raise UpcycleError(
            f"Index cache {cache}",
            kind="state",
            got=f"cannot be written: {error.strerror}",
            fix="let the training job's user write there, or set indices=FOLDER in the recipe's data",
        ) from None
    with lock:
        digest = sha256_file(manifest)
        marker = read_json(cache / MARKER) if is_complete(cache) else {}
        known = marker["files"] if marker.get("manifest") == digest else {}
        for path in _files(cache):
            if known.get(path.name) != path.stat().st_size:
                path.unlink()
        yield
        files = {path.name: path.stat().st_size for path in sorted(_files(cache))}
        if files != known:
            write_json(cache / MARKER, {"manifest": digest, "files": files})


def _files(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if _INDEX.fullmatch(path.name)]


def describe_blend(blend: FinishedBlend) -> str:
    """Describe a run's blend in a few words, for its report."""
    return f"blend {blend.name} ({blend.folder.name}){blend.contamination}"


def log_tokens_read(blend: FinishedBlend, steps: int, step_tokens: int, parent_tokens: int = 0) -> None:
    """Log how many tokens a run reads, and warn if it reads a source for more than `max_epochs` epochs.

    Args:
        blend: blend that the run reads.
        steps: steps of the run.
        step_tokens: tokens in a step, over all ranks.
        parent_tokens: tokens that the parent run has already read in the same order; they are counted as read.
    """
    messages = show_messages()
    messages.info("%s", blend.describe(steps, step_tokens))
    if parent_tokens:
        messages.info("  the parent was already trained on %s tokens of this blend", f"{parent_tokens:,}")
    also = " (with the parent's training)" if parent_tokens else ""
    for text in blend.read_too_often(parent_tokens + steps * step_tokens, also):
        messages.warning("%s", text)


def require_few_epochs(blend: FinishedBlend, tokens: int) -> None:
    """Check that a run reads the demo's texts at most `MOST_EPOCHS` times.

    Args:
        blend: the demo's texts, which a run reads if it names no data.
        tokens: tokens that the run reads.

    Raises:
        UpcycleError: the run reads the texts more than `MOST_EPOCHS` times.
    """
    if (epochs := tokens / blend.manifest["splits"]["train"]["tokens"]) > MOST_EPOCHS:
        raise no_data(f"the training would read the demo's speeches {epochs:,.0f} times")


def clamp_interval(trainer: Any) -> None:
    """Lower a Lightning trainer's validation interval to the run's number of steps plus one, and log the change.

    Lightning refuses an interval that is longer than the data. If the interval equals the run's number of steps, NeMo
    expects the validation to write the last checkpoint, but the validation may not write it.

    Args:
        trainer: Lightning's trainer before it starts; an interval that is a fraction of the data is kept.
    """
    interval, steps = trainer.val_check_interval, trainer.max_steps
    if isinstance(interval, int) and interval > steps:
        trainer.val_check_interval = steps + 1
        if trainer.limit_val_batches and is_first_rank():
            text = "no validation in %d steps, because trainer.val_check_interval is %d; set it to %d or less"
            show_messages().info(text, steps, interval, steps)
