"""Writes a small finished data folder in the form that `nemo-upcycle data` leaves, with Megatron's own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy

from nemo_upcycle.data.finished import FORMAT, HELDOUT, MANIFEST, TOKENIZER
from nemo_upcycle.data.tokenizers import open_tokenizer, tokenizer_sha256
from nemo_upcycle.utils.files import MARKER, write_json


#: Source -> weight, and split -> number of documents in each file of the split. A document has 20 to 60 tokens.
SOURCES: dict[str, tuple[float, dict[str, list[int]]]] = {
    "talks": (0.7, {"train": [90], "validation": [12]}),
    "books": (0.3, {"train": [40, 20], "validation": [8]}),
}

#: Hash of the first 1,200 samples of `SOURCES`, made from the token hash of each sample. A sample has 16 tokens.
ORDER = "cf136c4e5ed22e40b01b0e5cd91f0c18258d633177c2806a4c22de26832b0c93"


def write_blend(
    folder: Path, dense: Path, sources: Any = None, texts: dict[str, list[str]] | None = None, **manifest: Any
) -> Path:
    """Write a finished data folder from random tokens or from given texts, and return the folder.

    Args:
        folder: folder to create.
        dense: folder of the dense model, whose tokenizer is used.
        sources: sources in the form of `SOURCES`.
        texts: split -> texts of the only source, in place of random tokens. The texts of `heldout` are not tokenized.
        manifest: manifest entries to change.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    tokenizer = open_tokenizer(dense)
    numbers = numpy.random.RandomState(5)
    (folder / "tokens").mkdir(parents=True)
    entries: dict[str, Any] = {}
    if texts:
        held = [{"source": "texts", "id": f"{n}", "text": text} for n, text in enumerate(texts.get("heldout", []))]
        (folder / HELDOUT).write_text("".join(json.dumps(line) + "\n" for line in held))
        texts = {split: documents for split, documents in texts.items() if split != "heldout"}
        sources = {"texts": (1.0, {split: [len(documents)] for split, documents in texts.items()})}
    for source, (weight, files) in (sources or SOURCES).items():
        splits = {}
        for split, sizes in files.items():
            prefixes, tokens = [], 0
            for number, documents in enumerate(sizes):
                prefixes.append(f"tokens/{source}_{split}_{number:02d}_text_document")
                path = str(folder / prefixes[-1])
                builder = IndexedDatasetBuilder(f"{path}.bin", dtype=DType.optimal_dtype(len(tokenizer)))
                for position in range(documents):
                    if texts:
                        ids = tokenizer(texts[split][position], add_special_tokens=False, verbose=False)["input_ids"]
                    else:
                        ids = numbers.randint(0, 200, numbers.randint(20, 60)).tolist()
                    ids.append(tokenizer.eos_token_id)
                    builder.add_document(ids, [len(ids)])
                    tokens += len(ids)
                builder.finalize(f"{path}.idx")
            splits[split] = {"prefixes": prefixes, "documents": sum(sizes), "tokens": tokens, "bytes": 4 * tokens}
        entries[source] = {"weight": weight, "license": "none", "trains": [], "splits": splits}
    digest = tokenizer_sha256(tokenizer)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(folder / TOKENIZER)
    train = sum(entry["splits"]["train"]["tokens"] for entry in entries.values())
    written = {
        "format": FORMAT,
        "blend": "tiny",
        "seed": 1234,
        "seq_length": 16,
        "max_epochs": 4.0,
        "tokenizer": {"vocab_size": len(tokenizer), "eos_id": tokenizer.eos_token_id, "sha256": digest},
        "sources": entries,
        "splits": {"train": {"tokens": train}},
    }
    write_json(folder / MANIFEST, written | manifest)
    write_json(folder / MARKER, {})
    return folder


def set_manifest(folder: Path, **entries: Any) -> None:
    """Change entries in the manifest of a finished folder."""
    from nemo_upcycle.utils.files import read_json

    write_json(folder / MANIFEST, read_json(folder / MANIFEST) | entries)


def mark_documents(folder: Path) -> dict[str, list[int]]:
    """Replace all tokens of each training document by one number of its own; return the numbers of each source."""
    from nemo_upcycle.data.finished import open_blend
    from nemo_upcycle.data.indexed_dataset import read_documents

    marks: dict[str, list[int]] = {}
    first = 0
    for source, prefixes in open_blend(folder).tokens["train"].items():
        for prefix in sorted(prefixes):
            lengths, tokens = read_documents(folder / prefix)
            numbers = range(first, first := first + len(lengths))
            marks[source] = [*marks.get(source, []), *numbers]
            numpy.repeat(numbers, lengths).astype(tokens.dtype).tofile(folder / f"{prefix}.bin")
    return marks
