"""A checkpoint in Megatron against its exported folder in transformers: the same numbers, how fast?

    python -m benchmarks.evaluate runs/demo [--questions 500]

Scores the same MMLU questions (four answers each, by letter and by text) with both, of the upcycled model and
the dense baseline of a finished run, one process after the other; float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nemo_upcycle.evaluation.compare import compare_items
from nemo_upcycle.utils.files import read_json


_SUITE = """
tasks: {{mmlu_letter: [0], mmlu_answer: [0]}}
questions: {{total: {questions}, max_characters: 200}}
dtype: float32
batch_size: 8
"""


def main() -> None:
    """Measure and print one line for each model and back end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run of the pipeline")
    parser.add_argument("--questions", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "suite.yaml").write_text(_SUITE.format(questions=args.questions))
        for stage in ("pretrain", "dense_ct"):
            _measure(args.run, stage, folder)


def _measure(run: Path, stage: str, folder: Path) -> None:
    exported, results = folder / f"{stage}-hf", folder / "results"
    dense = run / "dense"
    _call("export", run / stage, exported, "--dense", dense, "--dtype", "float32")
    found: dict[str, Any] = {}
    for name, model in (("hf", exported), ("megatron", run / stage)):
        suite = folder / "suite.yaml" if not (results / "suite").is_dir() else results / "suite"
        _call("evaluate", model, suite, results, "--name", f"{stage}-{name}", "--dense", dense)
        found[name] = read_json(results / f"{stage}-{name}.json")
        seconds = found[name]["seconds"]
        asking_s = seconds["total"] - seconds["load"]
        items = sum(map(len, found[name]["items"].values()))
        line = {
            "model": stage,
            "backend": name,
            "items": items,
            "asking_s": round(asking_s, 1),
            "load_s": round(seconds["load"], 1),
        }
        sys.stdout.write(json.dumps(line) + "\n")
    compared = compare_items(found["hf"], found["megatron"])
    accuracies = {name: [one["metrics"][name]["value"] for one in found.values()] for name in found["hf"]["metrics"]}
    sys.stdout.write(json.dumps({"model": stage, **compared, "accuracies": accuracies}) + "\n")


def _call(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "nemo_upcycle.cli", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
