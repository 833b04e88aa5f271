"""Near duplicates: which planted pairs are removed, what is removed of other text, and what that costs.

    python -m benchmarks.near_duplicates   # writes benchmarks/results/near_duplicates.md; needs apt-get and 2 GB

The texts of `benchmarks.tokenise`, and behind them changed copies of some, each of one kind. The blend is built twice,
with and without `near_duplicates`. Of each text that is removed, the nearest one of the corpus is looked up: the share
of n-grams that the two have in common, of all that either has. Under 0.5 the removal is called false.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks.tokenise import corpus
from nemo_upcycle.data.blend import NearDuplicates, read_blend
from nemo_upcycle.data.build import build_blend
from nemo_upcycle.data.dense import ensure_dense
from nemo_upcycle.data.word_hashes import normalise, word_blocks
from nemo_upcycle.utils.files import read_json_lines
from tests.near import EQUAL, NEAR


RESULTS = Path(__file__).parent / "results" / "near_duplicates.md"
PLANTED = 200
LEAST_CHARACTERS = 500
#: Ends of the classes of what two texts have in common.
CLASSES = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)


def write_texts(folder: Path) -> tuple[list[str], Counter[str]]:
    """Write the corpus and the changed copies; return the corpus and the number of copies of each kind."""
    texts = [line["text"] for _, line in read_json_lines(corpus())]
    chance, kinds = random.Random(26), {**EQUAL, **NEAR}
    long = [text for text in texts if len(text) >= LEAST_CHARACTERS]
    copies: dict[str, str] = {}
    for kind, change in kinds.items():
        able = [text for text in chance.sample(long, min(len(long), 20 * PLANTED)) if change(text, chance) != text]
        copies |= {f"{kind}/{number}": change(text, chance) for number, text in enumerate(able[:PLANTED])}
    for name, lines in (("corpus", enumerate(texts)), ("planted", copies.items())):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as handle:
            for identity, text in lines:
                handle.write(json.dumps({"id": f"{name}/{identity}", "text": text}, ensure_ascii=False) + "\n")
    return texts, Counter(identity.partition("/")[0] for identity in copies)


def build(folder: Path, *overrides: str) -> tuple[dict[str, set[str]], float]:
    """Build the blend; return the ids of what was removed as a duplicate, by reason, and the CPU seconds."""
    blend = folder / "near.yaml"
    blend.write_text(
        "sources: {corpus: {train: [corpus.jsonl]}, planted: {train: [planted.jsonl]}}\n"
        f"hold_out: {{validation: 0, heldout: 0}}\ntokenizer: {ensure_dense('asset://smollm2-135m')}\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with TemporaryDirectory(dir=folder) as output:
        build_blend(read_blend(blend, overrides), Path(output) / "data")
        removed: dict[str, set[str]] = {"duplicate": set(), "near duplicate": set()}
        for path in (Path(output) / "data/build/removed").glob("*.jsonl"):
            for _, line in read_json_lines(path):
                removed[line["reason"]].add(line["id"].partition("@")[0])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return removed, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def n_grams(text: str, size: int) -> np.ndarray:
    """Return the hashes of the n-grams of a text, once each."""
    grams = [block.grams(size) for block in word_blocks(normalise(text), size - 1)]
    return np.unique(np.concatenate([np.empty(0, np.uint64), *grams]))


def nearest(texts: list[str], removed: list[int]) -> list[tuple[float, int]]:
    """Return, of each removed text, the largest share that it has in common with another, and that one's number."""
    size = NearDuplicates().n_grams
    grams = [n_grams(text, size) for text in texts]
    owners = np.repeat(np.arange(len(grams), dtype=np.int32), [len(one) for one in grams])
    hashes = np.concatenate(grams)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    sizes = np.array([len(one) for one in grams])
    found = []
    for number in removed:
        starts, stops = (np.searchsorted(hashes, grams[number], side) for side in ("left", "right"))
        sharing = np.concatenate([owners[start:stop] for start, stop in zip(starts, stops, strict=True)])
        shared = np.bincount(sharing, minlength=len(texts))
        shared[number] = 0
        parts = shared / np.maximum(sizes[number] + sizes - shared, 1)
        found.append((float(parts.max()), int(parts.argmax())))
    return found


def planted_lines(copies: Counter[str], removed: dict[str, set[str]]) -> list[str]:
    """Return a row for each kind of planted copy."""
    counts = {}
    for reason, names in removed.items():
        counts[reason] = Counter(name.split("/")[1] for name in names if name.startswith("planted/"))
    lines = ["| planted copy | copies | removed as equal | as a near duplicate |", "|---|---:|---:|---:|"]
    for kind, count in copies.items():
        lines.append(f"| {kind} | {count} | {counts['duplicate'][kind]} | {counts['near duplicate'][kind]} |")
    return lines


def corpus_lines(texts: list[str], removed: dict[str, set[str]]) -> list[str]:
    """Return how much the removed texts of the corpus have in common with others."""
    numbers = sorted(int(name.split("/")[1]) for name in removed["near duplicate"] if name.startswith("corpus/"))
    found = dict(zip(numbers, nearest(texts, numbers), strict=True))
    classes, _ = np.histogram([part for part, _ in found.values()], CLASSES)
    lines = [
        f"Of the {len(texts):,} texts themselves {len(numbers):,} were removed as near duplicates;"
        f" {classes[0]} of them have under {CLASSES[1]} in common with any other.",
        "",
        "| in common with the nearest text | removed |",
        "|---|---:|",
        *(f"| {CLASSES[n]:.1f} to {min(CLASSES[n + 1], 1):.1f} | {count:,} |" for n, count in enumerate(classes)),
    ]
    return lines


def main() -> None:
    """Measure, print, and keep the tables."""
    with TemporaryDirectory(prefix="nemo-upcycle-benchmark-") as name:
        folder = Path(name)
        texts, copies = write_texts(folder)
        size_mb = sum(path.stat().st_size for path in folder.glob("*.jsonl")) / 1e6
        _, plain_s = build(folder)
        removed, near_s = build(folder, "near_duplicates={}")
    settings = ", ".join(f"{name} {value}" for name, value in vars(NearDuplicates()).items())
    lines = [
        f"`python -m benchmarks.near_duplicates`, {os.cpu_count()} cores; {settings}",
        "",
        f"{len(texts):,} texts and {copies.total():,} changed copies, {size_mb:.0f} MB.",
        "",
        *planted_lines(copies, removed),
        "",
        *corpus_lines(texts, removed),
        "",
        f"CPU of a build: {plain_s:.0f} s without, {near_s:.0f} s with it: {size_mb / (near_s - plain_s):.1f} MB per"
        " core-second for MinHash.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
