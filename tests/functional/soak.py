"""Kill runs at many moments, start them again, and compare their results with an undisturbed run.

    python -m tests.functional.soak --kills 60 training pipeline        (`make weekly`)

Half of the kills are aimed at a moment: in the first save, in the removal of an old checkpoint, or between a stage's
work and its marker. The other kills come after a random time. The soak fails if a run cannot finish afterwards, or if
its result is not bit-identical.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_upcycle.sources.checkpoints import complete_checkpoints, newest_checkpoint
from nemo_upcycle.utils.files import read_json
from tests.functional.kills import Strike
from tests.functional.runs import Runs
from tests.functional.stages import STAGES, run_in_own_process
from tests.functional.tiny import write_plan


STEPS, EVERY = 6, 2
#: Number of ranks, and whether they save asynchronously.
TRAININGS = ((1, False), (1, True), (2, True))
TRAINING_AIMS = (
    Strike("open", ".distcp"),  # inside the first save
    Strike("os.remove", "checkpoints", count=2, inside_removal=True),  # inside the removal of the previous checkpoint
    Strike("os.rename", ".metadata"),  # all is written, but `.metadata` still has a temporary name
    Strike("os.remove", "-unfinished"),  # the checkpoint is complete, but still marked as unfinished
    Strike("os.remove", "checkpoints", inside_removal=True),
    Strike("open", ".distcp", count=2),
    Strike("open", "-unfinished"),  # nothing is written yet
    Strike("open", "common.pt"),
    Strike("open", ".metadata"),
    Strike("open", ".distcp", count=3),  # the second save
    Strike("os.remove", "checkpoints", count=4, inside_removal=True),
    Strike("os.remove", "-unfinished", count=2),
    Strike("open", "metrics.jsonl", count=3),
    Strike("open", "-unfinished", count=3),
)


def aims(aimed: Sequence[Strike], latest_s: float, ranks: int = 1) -> Iterator[Strike]:
    """Yield kills without end: every second kill is aimed, the others come at a random time."""
    numbers = random.Random(ranks)
    for aim in itertools.cycle(aimed):
        yield aim
        yield Strike(delay_s=numbers.uniform(0.1, latest_s), rank=numbers.randrange(ranks))


def training_result(folder: Path) -> dict[str, Any]:
    """Return the result of a finished training: hashes of all tensors, and its metrics without times and memory."""
    from nemo_upcycle.sources.distributed_checkpoint import DistributedCheckpoint

    kept = newest_checkpoint(folder / "checkpoints")
    assert kept is not None, f"no complete checkpoint in {folder}"
    with DistributedCheckpoint(kept / "weights") as checkpoint:
        tensors = {name: _digest(checkpoint.read(name)) for name in sorted(checkpoint.names())}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "tokens_per_s", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "memory_gib", "memory_share")
    metrics = [{name: value for name, value in line.items() if name not in timed} for line in lines]
    return {"checkpoint": kept.name, "tensors": tensors, "metrics": metrics}


def _digest(tensor: Any) -> str:
    import torch

    return hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def survive(start: Callable[[Strike | None], bool], strikes: Iterator[Strike], kills: int, seen: Counter[str]) -> None:
    """Start a run again and again until it has been killed `kills` times, then let it finish.

    Args:
        start: function that starts the run, with or without a strike, and returns whether it finished.
        strikes: strikes to use one after the other. If the moment of a strike does not come, the run finishes.
        kills: number of kills.
        seen: counter of kills by kind.
    """
    for strike in itertools.islice(strikes, kills):
        if start(strike):
            return
        seen[f"{strike.event or 'random'} {strike.where}".strip()] += 1
    assert start(None), "the run was killed although nobody did it"


def soak(
    folder: Path,
    kills: int,
    strikes: Iterator[Strike],
    start: Callable[[str, Path, Strike | None], Any],
    result: Callable[[Path], dict[str, Any]],
    *,
    stages: Sequence[str] = ("pretrain",),
    kills_a_stage: int = 4,
) -> Counter[str]:
    """Kill runs `kills` times in all; every run must end bit-identical to an undisturbed run.

    Args:
        folder: folder for the runs.
        kills: number of kills.
        strikes: strikes that kill the runs.
        start: function that runs a stage of the run in a folder, with or without a strike.
        result: function that reads the result of a finished run.
        stages: stages of a run, in order.
        kills_a_stage: largest number of kills of one stage in one run.

    Raises:
        AssertionError: A run ended differently, or could not resume.
    """
    seen: Counter[str] = Counter()

    def run(name: str, kills_left: Callable[[], int]) -> dict[str, Any]:
        for stage in stages:

            def once(strike: Strike | None, stage: str = stage) -> bool:
                return _finishes(lambda: start(stage, folder / name, strike))

            survive(once, strikes, min(kills_a_stage, kills_left()), seen)
        return result(folder / name)

    wanted = run("undisturbed", lambda: 0)
    for number in itertools.count():
        got = run(f"run-{number}", lambda: kills - sum(seen.values()))
        other = [name for name, value in wanted.items() if got[name] != value]
        assert not other, f"{folder / f'run-{number}'} after {dict(seen)}: other {other}"
        if sum(seen.values()) >= kills:
            break
    return seen


def soak_training(folder: Path, kills: int, *, ranks: int, asynchronous: bool) -> Counter[str]:
    """Kill trainings and compare their results; see `soak`."""
    runs = Runs(folder)
    options = {"steps": STEPS, "every": EVERY, "asynchronous": asynchronous, "ep": ranks}

    def start(_: str, run_dir: Path, strike: Strike | None) -> None:
        runs.train(run_dir.name, ranks, **options, **({"strike": strike} if strike else {}))

    def result(run_dir: Path) -> dict[str, Any]:
        complete = [path.name for path in complete_checkpoints(run_dir / "checkpoints")]
        return training_result(run_dir) | {"complete": complete}

    return soak(folder, kills, aims(TRAINING_AIMS, 5.0, ranks), start, result)


def _finishes(train: Callable[[], Any]) -> bool:
    """Return whether a run finished; False if one of its ranks was killed.

    Raises:
        RuntimeError: The run failed by itself.
    """
    try:
        train()
    except RuntimeError as error:
        # The last two messages appear if a rank that waited for the killed rank answers first.
        killed = ("died without an answer", "Connection closed by peer", "Connection reset by peer")
        if not any(words in str(error) for words in killed):
            raise
        return False
    return True


PIPELINE_AIMS = (
    Strike("os.rename", "_SUCCESS.json"),  # the stage's work is done, but its marker is missing
    Strike("os.rename", "nemo_upcycle.json"),  # the same for a model's folder
    Strike("os.rename", ".partial"),  # a folder is complete, except for its name
    Strike("open", "safetensors"),
    Strike("os.rename", "receipt.json"),
    Strike("os.rename", "results.json"),
    Strike("open", ".distcp", count=2),
    Strike("os.remove", "checkpoints", inside_removal=True),
    Strike("open", "evaluation"),
)


def pipeline_result(run_dir: Path) -> dict[str, Any]:
    """Return the result of a finished pipeline: hashes of the exported weights, training metrics, scores."""
    folders = {"trained": "hf", "dense_ct": "dense_ct/hf", "step0": "upcycle/hf"}
    weights = {
        f"{name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for name, folder in folders.items()
        for path in sorted((run_dir / folder).glob("*.safetensors"))
    }
    scores = {name: read_json(run_dir / f"evaluation/{name}.json")["metrics"] for name in ("dense", *folders)}
    return {"weights": weights, "scores": scores, "metrics": training_result(run_dir / "pretrain")["metrics"]}


def soak_pipeline(folder: Path, kills: int) -> Counter[str]:
    """Kill the stages of whole pipelines and compare the results; see `soak`."""
    plan = write_plan(folder)

    def start(name: str, run_dir: Path, strike: Strike | None) -> None:
        plan.write(run_dir)
        answer = run_in_own_process(name, run_dir, kill_at=strike)
        assert answer.status == 0, f"[{name}] in {run_dir}: {answer.text}"

    return soak(folder, kills, aims(PIPELINE_AIMS, 4.0), start, pipeline_result, stages=STAGES, kills_a_stage=2)


def main() -> None:
    """Run the soaks named on the command line, and print the number of survived kills of each kind."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="of each part (default: 60)")
    parser.add_argument("parts", nargs="*", default=["training", "pipeline"], help="training, pipeline")
    args = parser.parse_args()
    jobs: list[tuple[str, str, Callable[[Path], Counter[str]]]] = [
        ("pipeline", "pipeline", partial(soak_pipeline, kills=args.kills))
    ]
    for ranks, asynchronous in TRAININGS:
        title = f"training on {ranks} ranks, {'asynchronously' if asynchronous else 'synchronously'} saved"
        options = {"kills": args.kills // len(TRAININGS), "ranks": ranks, "asynchronous": asynchronous}
        jobs.append(("training", title, partial(soak_training, **options)))
    for part, title, work in jobs:
        if part in args.parts:
            with tempfile.TemporaryDirectory(prefix="soak-") as folder:
                seen = work(Path(folder))
            sys.stdout.write(f"{title}: {sum(seen.values())} kills, every run bit-equal\n")
            sys.stdout.writelines(f"  {count:3d}  {kind}\n" for kind, count in sorted(seen.items()))


if __name__ == "__main__":
    main()
