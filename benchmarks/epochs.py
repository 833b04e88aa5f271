"""What the order of the samples costs a run: bytes of its indices, seconds before the first start and every later one.

    python -m benchmarks.epochs     # writes benchmarks/results/epochs.md; needs 1 GB of disk

Sources of documents with lengths as of web text (log-normal, mean 1,000 tokens), in sequences of 8,192, are laid out
for whole epochs by `EpochDataset` and by Megatron's own `GPTDataset`. The index of a source is written as
`nemo-upcycle data` writes it; its tokens, which the order does not look at, are a sparse file. The rows of 100B tokens
are the row above them times ten. How sources alternate in a blend of two is measured at its full length.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy

from nemo_upcycle.data.epoch_dataset import EpochDataset
from nemo_upcycle.data.indexed_dataset import HEADER, MAGIC, VERSION


RESULTS = Path(__file__).parent / "results" / "epochs.md"
SEQUENCE, DOCUMENT_TOKENS = 8192, 1000
#: Tokens of a source, and its epochs.
SIZES = ((100_000_000, 1), (1_000_000_000, 1), (10_000_000_000, 1), (2_500_000_000, 4))
RUN_TOKENS = 100_000_000_000
INT32_CODE, INT32_BYTES = 4, 4


def write_source(folder: Path, tokens: int) -> tuple[str, int]:
    """Write a source of about so many tokens; return its prefix and its tokens."""
    random = numpy.random.default_rng(1)
    drawn = random.lognormal(numpy.log(DOCUMENT_TOKENS) - 0.5, 1.0, tokens // DOCUMENT_TOKENS)  # of that mean
    lengths = drawn.astype(numpy.int32) + 1
    starts = numpy.zeros(len(lengths), dtype=numpy.int64)
    numpy.cumsum(lengths[:-1].astype(numpy.int64) * INT32_BYTES, out=starts[1:])
    prefix = folder / "web_train_00_text_document"
    with prefix.with_suffix(".idx").open("wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, INT32_CODE, len(lengths), len(lengths) + 1))
        for array in (lengths, starts, numpy.arange(len(lengths) + 1, dtype=numpy.int64)):
            array.tofile(index)
    total = int(lengths.sum(dtype=numpy.int64))
    with prefix.with_suffix(".bin").open("wb") as data:
        data.truncate(total * INT32_BYTES)
    return str(prefix), total


def lay_out(kind: Any, prefix: str, num_samples: int) -> tuple[float, Any]:
    """Return the seconds in which a rank has a source's samples, and the data set."""
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers.text.libraries.null_tokenizer import NullTokenizer

    start_s = time.monotonic()
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=SEQUENCE,
        blend_per_split=[([prefix], None), None, None],
        path_to_cache=str(Path(prefix).parent / "indices"),
        tokenizer=NullTokenizer(128_000),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents = kind.build_low_level_dataset(prefix, config)
    numbers = numpy.arange(len(documents), dtype=numpy.int32)
    dataset = kind(documents, prefix, numbers, num_samples, Split.train, config)
    dataset[0], dataset[len(dataset) - 1]
    return time.monotonic() - start_s, dataset


def measure(kind: Any, tokens: int, epochs: int) -> tuple[int, float, float]:
    """Return the bytes of the indices, and the seconds of a first and of a later start."""
    with TemporaryDirectory() as folder:
        prefix, total = write_source(Path(folder), tokens)
        num_samples = (epochs * total - 1) // SEQUENCE
        first_s, dataset = lay_out(kind, prefix, num_samples)
        size_bytes = sum(path.stat().st_size for path in Path(folder, "indices").iterdir())
        del dataset
        later_s, _ = lay_out(kind, prefix, num_samples)
    return size_bytes, first_s, later_s


def alternate() -> tuple[int, float]:
    """Return bytes and seconds of what says which of two sources each sample of the whole run is of."""
    from megatron.core.datasets.helpers import build_blending_indices

    samples = RUN_TOKENS // SEQUENCE
    sources, numbers = numpy.zeros(samples, dtype=numpy.int16), numpy.zeros(samples, dtype=numpy.int64)
    start_s = time.monotonic()
    build_blending_indices(sources, numbers, [0.7, 0.3], 2, samples, False)
    return sources.nbytes + numbers.nbytes, time.monotonic() - start_s


def main() -> None:
    """Measure every size, print, and keep the table."""
    from megatron.core.datasets.gpt_dataset import GPTDataset

    logging.disable(logging.WARNING)
    lines = [
        "`python -m benchmarks.epochs`, one core, documents of 1,000 tokens, sequences of 8,192",
        "",
        "| | tokens of the source | epochs | indices, MB | first start, s | later start, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in (EpochDataset, GPTDataset):
        for tokens, epochs in SIZES:
            row = measure(kind, tokens, epochs)
            lines.append(_line(kind.__name__, tokens, epochs, *row))
            if (times := RUN_TOKENS // (tokens * epochs)) == 10:
                lines.append(_line("computed", 10 * tokens, epochs, *(times * value for value in row)))
    size_bytes, seconds = alternate()
    size = f"{size_bytes / 1e6:.0f} MB, {seconds:.1f} s"
    lines += ["", f"Which of two sources each sample of 100B tokens is of: {size}."]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


def _line(name: str, tokens: int, epochs: int, size_bytes: float, first_s: float, later_s: float) -> str:
    return f"| {name} | {tokens / 1e9:g}B | {epochs} | {size_bytes / 1e6:.1f} | {first_s:.2f} | {later_s:.2f} |"


if __name__ == "__main__":
    main()
