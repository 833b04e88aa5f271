"""Open the tokenizer in a model's folder without transformers, whose import takes seconds."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.utils.files import read_json


#: Files that are read in addition to the tokenizer itself.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FIX = "copy it again from where the model came from"


def check_tokenizer(folder: Path) -> None:
    """Check that the tokenizer files of a folder can be read. A folder without tokenizer files passes.

    Args:
        folder: a Hugging Face folder.

    Raises:
        CheckpointError: the tokenizer is damaged.
        UpcycleError: one of the tokenizer's settings files is damaged.
    """
    for name in _SETTINGS:
        if (folder / name).is_file():
            read_json(folder / name)
    path = folder / "tokenizer.json"
    if path.is_file():
        stat = path.stat()
        _open(path, stat.st_size, stat.st_mtime_ns)


@lru_cache
def _open(path: Path, size_bytes: int, modified_ns: int) -> None:
    """Open a tokenizer.json. The result is cached until the file changes."""
    try:
        from tokenizers import Tokenizer
    except ImportError:  # without this library, nothing here can use the tokenizer
        read_json(path)
        return
    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a plain Exception
        got = f"is damaged ({' '.join(str(error).split())})"
        raise CheckpointError(str(path), kind="state", got=got, fix=_FIX) from None
