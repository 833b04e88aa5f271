"""Turn documents into Megatron indexed datasets for training, and held-out texts for perplexity."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from nemo_upcycle.data.corpus import Document, Documents
from nemo_upcycle.data.dense import require_tokenizer
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.hf_model import load_tokenizer
from nemo_upcycle.utils.files import (
    MARKER,
    output_folder,
    read_json_lines,
    require_complete,
    sha256_file,
    write_json,
)
from nemo_upcycle.utils.progress import ProgressLine


MANIFEST = "manifest.json"
HELDOUT = "heldout.jsonl"
TOKENIZER = "tokenizer"
_SEED = 1234


def prepare_corpus(documents_by_split: Documents, tokenizer_folder: Path, output: Path) -> dict[str, Any]:
    """Tokenise a corpus and write everything that training and evaluation read.

    The end-of-text token closes every document. The documents of `train` are shuffled with a fixed seed, so that a
    short run sees a mix.

    Training has to use `tokenizer/`, for two reasons. NeMo copies the folder of its tokenizer into every checkpoint,
    and the dense model's folder holds all its weights. And Megatron's datasets mask the padding token in the loss and
    replace it by token 0: many models pad with their end-of-text token, which the model would then never learn, so
    the padding token of `tokenizer/` is one that does not occur in the corpus.

    Args:
        documents_by_split: `train`, `validation` and `heldout`, as `load_corpus` returns them.
        tokenizer_folder: the dense model's folder.
        output: the folder to make: `{train,validation}_text_document.{bin,idx}`, `heldout.jsonl`,
            `tokenizer/`, `manifest.json` and the success marker.

    Returns:
        The manifest: for each split the file, documents, tokens, UTF-8 bytes of text and sha256 of the file; and the
        tokenizer's vocabulary size, end-of-text and padding ids and hash.

    Raises:
        CheckpointError: the folder holds no usable tokenizer, or one without an end-of-text token.
    """
    tokenizer = _load_tokenizer(tokenizer_folder)
    total = sum(len(documents) for documents in documents_by_split.values())
    with output_folder(output) as folder, ProgressLine("tokenise", total=total) as progress:
        writer = _Writer(tokenizer, progress)
        train = list(documents_by_split["train"])
        random.Random(_SEED).shuffle(train)
        splits = {
            "train": writer.indexed(train, _prefix(folder, "train")),
            "validation": writer.indexed(documents_by_split["validation"], _prefix(folder, "validation")),
            "heldout": writer.jsonl(documents_by_split["heldout"], folder / HELDOUT),
        }
        manifest = {
            "tokenizer": _save_tokenizer(tokenizer, writer.seen, folder / TOKENIZER),
            "shuffle_seed": _SEED,
            "splits": splits,
        }
        write_json(folder / MANIFEST, manifest)
        write_json(folder / MARKER, {"tokens": {split: entry["tokens"] for split, entry in splits.items()}})
    return manifest


def data_arguments(folder: Path) -> dict[str, Any]:
    """Return the arguments of NeMo's `PreTrainingDataModule` that read a prepared corpus.

    Reads nothing, so that a recipe can be built before its corpus. The tokenizer is in `folder / TOKENIZER`.

    Args:
        folder: the `output` of `prepare_corpus`; Megatron's shuffled indices go into it, so all nodes must share it.

    Example:
        >>> tokenizer = run.Config(AutoTokenizer, str(folder / TOKENIZER))  # doctest: +SKIP
        >>> run.Config(llm.PreTrainingDataModule, **data_arguments(folder), tokenizer=tokenizer)  # doctest: +SKIP
    """
    train, validation = ([str(_prefix(folder, split))] for split in ("train", "validation"))
    return {
        "paths": {"train": train, "validation": validation, "test": list(validation)},
        "split": None,  # the three paths are the split; NeMo warns about any other value
        "index_mapping_dir": str(folder / "indices"),
    }


def heldout_documents(folder: Path) -> list[Document]:
    """Read the held-out texts of a prepared corpus.

    Raises:
        UpcycleError: `folder` is not a complete output of `prepare_corpus`.
    """
    require_complete(folder, "corpus", "run the pipeline's import stage")
    return [Document(**line) for _, line in read_json_lines(folder / HELDOUT)]


def _prefix(folder: Path, split: str) -> Path:
    return folder / f"{split}_text_document"


def _load_tokenizer(folder: Path) -> Any:
    require_tokenizer(folder)
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:  # the tokenizers library raises a plain Exception for a damaged file
        raise CheckpointError(
            f"tokenizer in {folder}",
            got=str(error).splitlines()[0],
            expected="files that transformers reads",
            fix="copy the dense model's tokenizer files again",
        ) from None
    if tokenizer.eos_token_id is None:
        raise CheckpointError(
            f"eos_token of the tokenizer in {folder}",
            got=None,
            expected="a token that closes a document",
            fix="set eos_token in tokenizer_config.json",
        )
    return tokenizer


def _save_tokenizer(tokenizer: Any, seen: set[int], folder: Path) -> dict[str, Any]:
    """Save the tokenizer with a padding token that no text contains; this changes the caller's tokenizer."""
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    special = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.additional_special_tokens]
    unused = [token for token in special if token and tokenizer.convert_tokens_to_ids(token) not in seen]
    tokenizer.pad_token = unused[0] if unused else None
    tokenizer.save_pretrained(folder)
    return {
        "vocab_size": len(tokenizer),
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "sha256": digest,
    }


class _Writer:
    """Encodes and writes documents; `seen` collects the ids that occur."""

    def __init__(self, tokenizer: Any, progress: ProgressLine) -> None:
        self.tokenizer, self.progress = tokenizer, progress
        self.seen: set[int] = set()

    def _encode(self, document: Document) -> list[int]:
        # verbose=False: texts may be longer than the model's context, they are cut into windows later
        ids = self.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        ids.append(self.tokenizer.eos_token_id)
        self.seen.update(ids)
        self.progress.advance()
        return ids

    def indexed(self, documents: list[Document], prefix: Path) -> dict[str, Any]:
        """Write a Megatron indexed dataset and return its entry of the manifest."""
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

        bin_path, idx_path = get_bin_path(str(prefix)), get_idx_path(str(prefix))
        builder = IndexedDatasetBuilder(bin_path, dtype=DType.optimal_dtype(len(self.tokenizer)))
        tokens = 0
        for document in documents:
            ids = self._encode(document)
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
        builder.finalize(idx_path)
        return _entry(documents, tokens, Path(bin_path))

    def jsonl(self, documents: list[Document], path: Path) -> dict[str, Any]:
        """Write the texts, one document a line, and return their entry of the manifest."""
        tokens = sum(len(self._encode(document)) for document in documents)
        with path.open("w", encoding="utf-8") as handle:
            for document in documents:
                handle.write(json.dumps({"id": document.id, "text": document.text}, ensure_ascii=False) + "\n")
        return _entry(documents, tokens, path)


def _entry(documents: list[Document], tokens: int, file: Path) -> dict[str, Any]:
    text_bytes = sum(len(document.text.encode()) for document in documents)
    return {
        "file": file.name,
        "documents": len(documents),
        "tokens": tokens,
        "text_bytes": text_bytes,
        "sha256": sha256_file(file),
    }
