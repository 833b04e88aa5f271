"""The tokenizer that is stored with tokenised data, and the hash that identifies the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.hf_model import load_tokenizer, other_special_tokens
from nemo_upcycle.sources.find import require_tokenizer
from nemo_upcycle.utils.files import aside_of


def open_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a dense model's folder.

    Raises:
        CheckpointError: the folder holds no fast tokenizer that transformers reads, or it has no end-of-text token.
    """
    require_tokenizer(folder)
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:  # the tokenizers library raises a plain Exception for a damaged file
        raise CheckpointError(
            f"Tokenizer in {folder}",
            kind="state",
            got=f"cannot be read by transformers ({str(error).splitlines()[0]})",
            fix="copy the dense model's tokenizer files again",
        ) from None
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"Tokenizer in {folder}",
            kind="refused",
            got=f"is a {type(tokenizer).__name__} without tokenizer.json, and a fast tokenizer is needed",
            fix="convert it with transformers (convert_slow_tokenizer), and save tokenizer.json in the folder",
        )
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"Tokenizer in {folder}",
            kind="missing",
            got="has no eos_token, which closes a document",
            fix="set eos_token in tokenizer_config.json",
        )
    return tokenizer


def tokenizer_sha256(tokenizer: Any) -> str:
    """Return the hash of everything that affects the ids: the tokenizer's description, without padding or names.

    The hash is the same under every release of transformers. If a tokenizer has no post-processor, release 5 adds one
    that does nothing; the hash ignores it.
    """
    from tokenizers import Tokenizer

    text = tokenizer.backend_tokenizer.to_str()
    after = json.loads(text)["post_processor"] or {}
    if after.get("type") == "TemplateProcessing" and not after["special_tokens"]:
        backend = Tokenizer.from_str(text)
        backend.post_processor = None
        text = backend.to_str()
    return hashlib.sha256(text.encode()).hexdigest()


def save_tokenizer(dense: Path, folder: Path) -> dict[str, Any]:
    """Save a dense model's tokenizer for training, with a padding token that appears in no document.

    Training must use this folder for two reasons. First, NeMo copies the folder of its tokenizer into every
    checkpoint, and the dense model's folder holds all its weights. Second, Megatron's datasets mask the padding token
    in the loss and replace it by token 0. Many models pad with their end-of-text token, and would then never learn
    this token. Here, the padding token is a special token. Special tokens appear in no document, because the data
    engine encodes the name of a special token in a text as ordinary text.

    Args:
        dense: folder of the dense model.
        folder: folder to write; an earlier folder is replaced.

    Returns:
        `vocab_size`, `eos_id`, `pad_id` and `sha256`.

    Raises:
        CheckpointError: see `open_tokenizer`.
        OSError: the disk is full.
    """
    tokenizer = open_tokenizer(dense)
    facts = {"vocab_size": len(tokenizer), "eos_id": tokenizer.eos_token_id, "sha256": tokenizer_sha256(tokenizer)}
    special = [tokenizer.pad_token, tokenizer.bos_token, *other_special_tokens(tokenizer)]
    tokenizer.pad_token = next((token for token in special if token and token != tokenizer.eos_token), None)
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        tokenizer.save_pretrained(aside)
    except Exception as error:  # the tokenizers library raises a plain Exception for a full disk
        if not (found := re.search(r"\(os error (\d+)\)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(aside)) from None
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return facts | {"pad_id": tokenizer.pad_token_id}
