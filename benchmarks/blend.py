"""The whole data stage on real text: what each step costs, and whether memory grows with the data.

    python -m benchmarks.blend              # writes benchmarks/results/blend.md; needs apt-get, dpkg-deb and 5 GB

The texts of `benchmarks.tokenise`, once and eight times over (each copy's documents begin with its number: none is a
duplicate), decontaminated against all of MMLU and tokenised with SmolLM2's tokenizer by one worker.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.tokenise import corpus
from nemo_upcycle.data.dense import ensure_dense


RESULTS = Path(__file__).parent / "results" / "blend.md"
COPIES = (1, 8)


def write_copies(folder: Path, copies: int) -> Path:
    """Write the texts so many times, one file a copy, and the blend that names them; return the blend."""
    for copy in range(copies):
        with (folder / f"{copy}.jsonl").open("w", encoding="utf-8") as handle:
            for line in corpus().open(encoding="utf-8"):
                handle.write(json.dumps({"text": f"{copy} {json.loads(line)['text']}"}, ensure_ascii=False) + "\n")
    blend = folder / "docs.yaml"
    blend.write_text(
        f"sources: {{docs: {{train: ['*.jsonl']}}}}\ndecontaminate: [full]\n"
        f"tokenizer: {ensure_dense('asset://smollm2-135m')}\n"
    )
    return blend


def build(copies: int) -> dict[str, Any]:
    """Build the blend in a process of its own; return its times, its memory, and what every task counted."""
    with TemporaryDirectory(prefix="nemo-upcycle-benchmark-") as folder:
        blend, output = write_copies(Path(folder), copies), Path(folder) / "data"
        start_s = time.monotonic()
        command = [sys.executable, "-m", "nemo_upcycle.cli", "data", str(blend), str(output)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall_s = time.monotonic() - start_s
        stats = [json.loads(path.read_text()) for path in sorted((output / "build/stats").glob("*.json"))]
    seconds: Counter[str] = Counter()
    for entry in stats:
        seconds.update(entry["seconds"])
    return {
        "size_mb": sum(entry["bytes_in"] for entry in stats) / 1e6,
        "documents": sum(entry["steps"]["read"]["in"] for entry in stats),
        "seconds": seconds,
        "wall_s": wall_s,
        # of the largest process that has ended; memory grows from one size to the next, if it does
        "peak_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def main() -> None:
    """Measure, and write the results."""
    load, builds = os.getloadavg()[0], [build(copies) for copies in COPIES]
    lines = [
        f"`python -m benchmarks.blend`, one worker, load of the machine before: {load:.1f}",
        "",
        "| text, MB | documents | wall, s | peak of the largest process, MiB |",
        "|---:|---:|---:|---:|",
        *(f"| {b['size_mb']:.0f} | {b['documents']:,} | {b['wall_s']:.0f} | {b['peak_mib']:.0f} |" for b in builds),
        "",
        "| step of the writing pass | CPU s | MB per core-second |",
        "|---|---:|---:|",
    ]
    last = builds[-1]
    total_s = sum(last["seconds"].values())
    for step, step_s in [*last["seconds"].items(), ("all", total_s)]:
        lines.append(
            f"| {step} | {step_s:.1f} | {last['size_mb'] / step_s:.1f} |" if step_s > 0.05 else f"| {step} | 0 | |"
        )
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
