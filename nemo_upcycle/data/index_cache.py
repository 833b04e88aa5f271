"""Keep Megatron's index cache whole: one process builds it at a time, and what a killed one left is deleted.

Megatron's datasets write the order of their samples into a folder, as .npy files named after a hash of the data's
path, number of samples, seed and sequence length. They neither rename a finished file into place nor look into one
that is there, so a file cut short, or one of data that were replaced under the same path, would be read as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import MARKER, is_complete, read_json, sha256_file, take_lock, write_json


logger = logging.getLogger(__name__)
_LOCK = ".lock"
#: Files of the cache; whatever else lies in the folder is left alone.
_INDEX = re.compile(r"[0-9a-f]{32}-\w+-(train|valid|test)-\w+\.(npy|txt)")


@contextmanager
def whole_indices(cache: Path, manifest: Path) -> Iterator[None]:
    """Delete indices that are not known to be whole, let the block read and build, and note what it leaves.

    Of several ranks, the first runs the block so; the others wait for it where Megatron lets them wait.

    Args:
        cache: the folder of the indices; the marker in it lists its files and their sizes.
        manifest: of the data; indices of another manifest are deleted.

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
        logger.info("wait for another run, which builds the indices in %s", cache)
        lock = take_lock(cache / _LOCK, timeout_s=-1)
    except OSError as error:
        raise UpcycleError(
            f"index cache {cache}",
            got=error.strerror,
            expected="a folder to write",
            fix="let the account of the training job write there, or give the recipe's data indices=FOLDER",
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
