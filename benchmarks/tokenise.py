"""Compare the data stage with datatrove's step (JSON lines to Megatron's .bin and .idx), and both with their floors.

    python -m benchmarks.tokenise           # writes benchmarks/results/tokenise.md; needs apt-get, dpkg-deb and 2 GB
    python -m benchmarks.tokenise ours      # one of the writers
    MEGATRON_LM=/src/Megatron-LM python -m benchmarks.tokenise      # also Megatron's tools/preprocess_data.py

The texts are the training texts of the blend `docs_small`. One page, on kbuild, is omitted. It contains `<filename>`,
a special token of SmolLM2, which the other writers remove from the text. Each writer has one thread, like a task of
the data stage. CPU time is counted after the imports. For Megatron's tool, the CPU time of a run over one document is
subtracted. A floor measures only the tokenizer library, which encodes texts in memory and writes nothing. All writers
must write the same bytes, and the floors must give the same number of ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from benchmarks.arguments import chosen


ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "tokenise.md"
PYTHON = ROOT / ".venv-data" / "bin" / "python"
MEGATRON_LM = os.environ.get("MEGATRON_LM", "")
REPEATS = 3
END, END_ID = "<|im_end|>", 2
SPECIAL = "<filename>"


def corpus() -> Path:
    """Return the file with the texts as JSON lines; make it on first use."""
    path = Path(gettempdir()) / "nemo-upcycle-benchmark" / "docs_small.jsonl"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".half")
        with aside.open("w", encoding="utf-8") as handle:
            for text in _texts():
                if SPECIAL not in text:
                    handle.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        aside.rename(path)
    return path


def _texts() -> Iterator[str]:
    from nemo_upcycle.data.blend import read_blend
    from nemo_upcycle.data.inputs import list_inputs

    blend = read_blend("docs_small")
    for source in blend.config.sources:
        for file in list_inputs(blend, source, Path())["train"]:
            if file.reader == "text":
                yield Path(file.path).read_text(encoding="utf-8")
            else:
                with Path(file.path).open(encoding="utf-8") as handle:
                    yield from (json.loads(line)["text"] for line in handle)


def _ours(path: Path, tokenizer: Path, folder: Path) -> Callable[[], dict[str, Any]]:
    from nemo_upcycle.data.engine.pipelines import RunOn, executor, stages
    from nemo_upcycle.data.engine.tasks import load_plan
    from nemo_upcycle.data.engine.tokenise import FASTOKENS

    task = {"source": "text", "reader": "jsonl", "split": "train", "files": [str(path)]}
    plan = {"tokenizer": str(tokenizer), "eos_id": END_ID, "vocab_size": 49152, "deduplicate": False, "tasks": [task]}
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
    loaded = load_plan(folder / "plan.json")

    def work() -> dict[str, Any]:
        (stage,) = stages(loaded, FASTOKENS)
        executor(loaded, stage, RunOn(), Path(sys.prefix)).run()
        return _hashes(folder)

    return work


def _datatrove(path: Path, tokenizer: Path, folder: Path) -> Callable[[], dict[str, Any]]:
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

    steps = [
        JsonlReader(str(path.parent), glob_pattern=path.name),
        MegatronDocumentTokenizer(str(folder), tokenizer_name_or_path=str(tokenizer), eos_token=END, batch_size=1000),
    ]

    def work() -> dict[str, Any]:
        LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(folder / "logs")).run()
        return _hashes(folder)

    return work


def _megatron(path: Path, tokenizer: Path, folder: Path) -> Callable[[], dict[str, Any]]:
    """Run Megatron-LM's tool in NeMo's environment; subtract its time for one document, which is its start-up time."""
    arguments = ["--workers", "1", "--append-eod", "--tokenizer-type", "HuggingFaceTokenizer"]
    command = [str(ROOT / ".venv/bin/python"), f"{MEGATRON_LM}/tools/preprocess_data.py", *arguments]
    command += ["--tokenizer-model", str(tokenizer.parent)]

    def preprocess(texts: Path, prefix: Path) -> float:
        before_s = _used()[0]
        said = subprocess.run(
            [*command, "--input", str(texts), "--output-prefix", str(prefix)], capture_output=True, text=True
        )
        if said.returncode:
            raise SystemExit(said.stderr[-2000:])
        return _used()[0] - before_s

    (folder / "one").mkdir()
    one = folder / "one.jsonl"
    with path.open(encoding="utf-8") as handle:
        one.write_text(handle.readline(), encoding="utf-8")
    start_s = preprocess(one, folder / "one/one")

    def work() -> dict[str, Any]:
        cpu_s = preprocess(path, folder / "all")
        return {"tokens": (folder / "all_text_document.bin").stat().st_size // 2, "cpu_s": cpu_s - start_s} | {
            suffix: _hash(folder / f"all_text_document{suffix}") for suffix in (".bin", ".idx")
        }

    return work


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _hashes(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".bin", ".idx"))
    found = {path.suffix: _hash(path) for path in files}
    return {"tokens": files[0].stat().st_size // 2, **found}  # the .bin


def _floor(path: Path, tokenizer: Path, encode: Callable[[list[str]], int]) -> Callable[[], dict[str, Any]]:
    """Encode texts in memory in batches of a thousand; `encode` returns the number of ids."""
    texts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]

    def work() -> dict[str, Any]:
        rest, found = iter(texts), len(texts)  # every document gets its end-of-text token
        while batch := list(islice(rest, 1000)):
            found += encode(batch)
        return {"tokens": found}

    return work


def _fastokens(path: Path, tokenizer: Path, folder: Path) -> Callable[[], dict[str, Any]]:
    import fastokens

    loaded = fastokens.Tokenizer.from_file(str(tokenizer))
    return _floor(
        path, tokenizer, lambda batch: len(loaded.encode_batch_flat(batch, split_special_tokens=True)[0]) // 4
    )


def _tokenizers(path: Path, tokenizer: Path, folder: Path) -> Callable[[], dict[str, Any]]:
    import tokenizers

    loaded = tokenizers.Tokenizer.from_file(str(tokenizer))
    return _floor(path, tokenizer, lambda batch: sum(map(len, loaded.encode_batch_fast(batch))))


WRITERS: dict[str, tuple[str, Callable[[Path, Path, Path], Callable[[], dict[str, Any]]]]] = {
    "ours": ("the data stage", _ours),
    "datatrove": ("datatrove's MegatronDocumentTokenizer", _datatrove),
    "fastokens": ("floor: fastokens encode_batch_flat", _fastokens),
    "tokenizers": ("floor: tokenizers encode_batch_fast", _tokenizers),
}
if MEGATRON_LM:
    WRITERS["megatron"] = ("Megatron-LM's tools/preprocess_data.py", _megatron)


def worker(name: str, path: Path, tokenizer: Path) -> None:
    """Run one writer in this process, and print its time and memory."""
    with TemporaryDirectory(prefix="nemo-upcycle-tokenise-") as folder:
        work = WRITERS[name][1](path, tokenizer, Path(folder))
        start_s, start_cpu_s = time.perf_counter(), _used()[0]
        found = work()
        cpu_s, rss_gb = _used()
    print(json.dumps({"cpu_s": cpu_s - start_cpu_s, "s": time.perf_counter() - start_s, "rss_gb": rss_gb} | found))


def _used() -> tuple[float, float]:
    """Return CPU seconds and peak memory (GB) of this process and its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    # Do not use this process's ru_maxrss, because it starts at the memory of the parent process.
    peak_kb = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return sum(each.ru_utime + each.ru_stime for each in used), max(peak_kb, used[1].ru_maxrss) / 1e6


def measure(name: str, path: Path, tokenizer: Path) -> dict[str, Any]:
    """Run one writer in a process of the data environment."""
    command = [str(PYTHON), "-m", "benchmarks.tokenise", "--worker", name, str(path), str(tokenizer)]
    single = {**os.environ, "RAYON_NUM_THREADS": "1", "FASTOKENS_BPE_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=single)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(names: list[str]) -> str:
    """Return the results as Markdown."""
    from nemo_upcycle.sources.fetch import ensure_dense

    path, tokenizer = corpus(), Path(ensure_dense("asset://smollm2-135m")) / "tokenizer.json"
    sizes = [len(json.loads(line)["text"].encode()) for line in path.open(encoding="utf-8")]
    size_mb = sum(sizes) / 1e6
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    loads = [os.getloadavg()[0]]
    for _ in range(REPEATS):  # the writers take turns: a machine's speed changes
        for name in names:
            runs[name].append(measure(name, path, tokenizer))
            loads.append(os.getloadavg()[0])
            print(name, runs[name][-1], flush=True)
    for key in ("tokens", ".bin", ".idx"):
        found = {run[key] for each in runs.values() for run in each if key in run}
        if len(found) > 1:
            raise SystemExit(f"not the same {key}: {found}")
    ours_cpu_s = median(run["cpu_s"] for run in runs[names[0]])
    mark = "*" if min(loads) > 2 else ""
    rows = [
        f"{len(sizes):,} documents, {size_mb:.0f} MB of text, SmolLM2's tokenizer; same bytes and numbers of tokens. "
        f"Load of the machine before and between the runs: {min(loads):.1f} to {max(loads):.1f}; above 2 "
        "throughout, other work ran beside it (*).",
        "",
        f"| what | MB per CPU-second: median (all) | {names[0]} against it | peak RSS, GB |",
        "|---|---:|---:|---:|",
    ]
    for name, each in runs.items():
        speeds = [size_mb / run["cpu_s"] for run in each]
        every = ", ".join(f"{speed:.2f}" for speed in speeds)
        ratio = median(run["cpu_s"] for run in each) / ours_cpu_s
        rss_gb = max(run["rss_gb"] for run in each)
        rows.append(f"| {WRITERS[name][0]} | {median(speeds):.2f}{mark} ({every}) | {ratio:.2f}x | {rss_gb:.2f} |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str]) -> None:
    """Measure, and print and write the table."""
    if arguments[:1] == ["--worker"]:
        worker(arguments[1], Path(arguments[2]), Path(arguments[3]))
        return
    arguments = chosen(__doc__, arguments, WRITERS)
    if not PYTHON.exists():
        raise SystemExit(f"{PYTHON} is missing: make venv")
    from benchmarks.upcycle import tabulate

    how = f"{REPEATS} runs in turn, one thread{', MEGATRON_LM set' if MEGATRON_LM else ''}"
    tabulate(arguments, WRITERS, table, RESULTS, how)


if __name__ == "__main__":
    main(sys.argv[1:])
