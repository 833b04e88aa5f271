"""The last step: turn texts into the .bin and .idx files that Megatron reads.

Text is data: a literal `<|endoftext|>` in a text becomes ordinary tokens, never the token that ends a document. Added
tokens that are not special, such as GPT-NeoX's tokens for several blanks, are recognised, as in every other use of the
tokenizer.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile
from numpy.typing import NDArray

from nemo_upcycle.data.engine.ledger import Ledger, LedgerStep
from nemo_upcycle.data.engine.tasks import EnginePlan, aside, outputs
from nemo_upcycle.utils.masking import without_secrets


#: Type of a function that returns the token ids of texts, and the offsets where each text begins and the last text
#: ends.
Encode = Callable[[Sequence[str]], tuple[NDArray[np.uint32], NDArray[np.int64]]]
FASTOKENS, TOKENIZERS = "fastokens", "tokenizers"
_BATCH_CHARACTERS, _BATCH_DOCUMENTS = 1 << 21, 10_000
_LARGEST_16_BIT_VOCABULARY = 1 << 16
_PROBE = (
    "Ten years\t later,  12345.678 x≠y; don\u2019t — I'll, WE'VE!\r\n\n   naïve café Ünïcødé e\u0301 \u200b ﬁ ½ ²",
    "日本語のテキスト。中文混排 한국어 العربية हिन्दी ไทย 👩\u200d👩\u200d👧 🏳️\u200d🌈",
    "    def f(x):\n        return {'a': [x ** 2, -1e-9]}  # <html>&nbsp;</html>\n\t\t\tif (a&&b||!c) {}",
    "<|endoftext|> <|im_end|></s><s>[INST] <unk>", "", " ", "\n", "a" * 300,
)  # fmt: skip


def choose_library(plan: EnginePlan) -> tuple[str, str]:
    """Return the library that encodes the plan's texts, and the reason if it is not fastokens.

    fastokens is used if it loads the tokenizer and gives the same ids as `tokenizers` for texts of many kinds.
    """
    content = _tokenizer_json(plan)
    expected = _tokenizers_encode(content)(_PROBE)
    try:
        got = _fastokens_encode(content)(_PROBE)
    except BaseException as error:  # a Rust panic is not an Exception
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return TOKENIZERS, f"fastokens cannot load the tokenizer ({str(error).splitlines()[0][:120]})"
    if not (np.array_equal(got[0], expected[0]) and np.array_equal(got[1], expected[1])):
        return TOKENIZERS, "fastokens and tokenizers give different ids for this tokenizer"
    return FASTOKENS, ""


def load_encode(plan: EnginePlan, library: str) -> Encode:
    """Return the encoding function of a library."""
    return {FASTOKENS: _fastokens_encode, TOKENIZERS: _tokenizers_encode}[library](_tokenizer_json(plan))


def _tokenizer_json(plan: EnginePlan) -> str:
    """Return the tokenizer without a limit of length, and with its end-of-text token marked as special."""
    content = json.loads(Path(plan.tokenizer).read_text(encoding="utf-8"))
    content.update(truncation=None, padding=None)
    for token in content.get("added_tokens") or []:
        if token["id"] == plan.eos_id:
            token["special"] = True
    return json.dumps(content)


def _fastokens_encode(content: str) -> Encode:
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str(content)

    def encode(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        ids, offsets = tokenizer.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.frombuffer(offsets, np.int64)

    return encode


def _tokenizers_encode(content: str) -> Encode:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    tokenizer.encode_special_tokens = True  # encode the names of special tokens as ordinary text

    def encode(texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        all_ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
        offsets = np.cumsum([0, *(len(ids) for ids in all_ids)], dtype=np.int64)
        return np.fromiter(chain.from_iterable(all_ids), np.uint32, offsets[-1]), offsets

    return encode


class TokensFile(MegatronTokenizedFile):
    """datatrove's writer, but with 12 bytes of memory per document, whole batches, and a rename when complete."""

    def __init__(self, plan: EnginePlan, rank: int, split: str) -> None:
        self.final = {suffix: plan.path("tokens", rank, f"{split}.{suffix}") for suffix in ("bin", "idx")}
        token_size = 4 if plan.vocab_size > _LARGEST_16_BIT_VOCABULARY else 2
        folder = self.final["bin"].parent
        super().__init__(str(folder), aside(self.final["bin"]).name, token_size=token_size)
        self.eos_id = plan.eos_id
        self.sequence_lengths = array("i")
        self.document_indices = array("q", [0])

    def write_batch(self, _: Sequence[Document], ids: NDArray[np.uint32], offsets: NDArray[np.int64]) -> int:
        """Write documents, each with its end-of-text token, and return the number of tokens."""
        closed = np.insert(ids, offsets[1:] - offsets[0], self.eos_id).astype(self.token_dtype)
        self.bin_file.write(closed.tobytes())
        written = len(self.sequence_lengths)
        self.sequence_lengths.frombytes((np.diff(offsets) + 1).astype(np.int32).tobytes())
        self.document_indices.extend(range(written + 1, len(self.sequence_lengths) + 1))
        return len(closed)

    def _sequence_pointers(self, sequence_lengths: Any) -> Any:
        lengths = np.frombuffer(sequence_lengths, np.int32).astype(np.int64)
        return (np.cumsum(lengths) - lengths) * self.token_size

    def close(self) -> None:
        """Complete the files, and rename them to their final names."""
        super().close()
        for suffix, path in self.final.items():
            path.with_name(f"{self.filename}.{suffix}").replace(path)


class TextsFile:
    """Held-out documents as JSON lines."""

    def __init__(self, plan: EnginePlan, rank: int, split: str) -> None:
        self.final = {"jsonl": plan.path("tokens", rank, f"{split}.jsonl")}
        self.aside = aside(self.final["jsonl"])
        self.handle: IO[str] = self.aside.open("w", encoding="utf-8")

    def write_batch(self, documents: Sequence[Document], ids: NDArray[np.uint32], _: NDArray[np.int64]) -> int:
        """Write documents, and return the tokens that they would have, end-of-text tokens included."""
        for document in documents:
            line = json.dumps({"id": without_secrets(document.id), "text": document.text}, ensure_ascii=False)
            self.handle.write(line + "\n")
        return len(ids) + len(documents)

    def close(self) -> None:
        """Complete the file, and rename it to its final name."""
        self.handle.close()
        self.aside.replace(self.final["jsonl"])


class Tokenise(LedgerStep):
    """Encodes documents, writes them by split, and completes the record of the task."""

    type, name = "writer", "tokens"

    def __init__(self, ledger: Ledger, library: str) -> None:
        super().__init__(ledger)
        self.library = library

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Write the documents of a task."""
        plan = self.ledger.plan
        (plan.folder / "tokens").mkdir(exist_ok=True)
        self.files: dict[str, Any] = {}
        self.ledger.tokenizer = self.library
        encode = load_encode(plan, self.library)
        for batch in batches(data):
            self._write(batch, *encode([document.text for document in batch]))
        for file in self.files.values():
            file.close()
        written = {path for file in self.files.values() for path in file.final.values()}
        for path in outputs(plan, rank):  # an interrupted run with other input may have written more files
            if path not in written:
                path.unlink(missing_ok=True)
        self.ledger.finish()

    def _write(self, batch: list[Document], ids: NDArray[np.uint32], offsets: NDArray[np.int64]) -> None:
        start = 0
        while start < len(batch):  # write neighbouring documents of one split together
            split = batch[start].metadata["split"]
            stop = next((n for n in range(start, len(batch)) if batch[n].metadata["split"] != split), len(batch))
            self._write_run(split, batch[start:stop], ids[offsets[start] : offsets[stop]], offsets[start : stop + 1])
            start = stop

    def _write_run(
        self, split: str, documents: list[Document], ids: NDArray[np.uint32], offsets: NDArray[np.int64]
    ) -> None:
        if split not in self.files:
            kind = TextsFile if split == "heldout" else TokensFile
            self.files[split] = kind(self.ledger.plan, self.ledger.rank, split)
        tokens = self.files[split].write_batch(documents, ids, offsets)
        size_bytes = sum(len(document.text.encode()) for document in documents)
        self.ledger.splits[split].update(documents=len(documents), tokens=tokens, bytes=size_bytes)


def batches(data: DocumentsPipeline) -> Iterator[list[Document]]:
    """Yield lists of documents, each of about two million characters."""
    batch: list[Document] = []
    characters = 0
    for document in data:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
