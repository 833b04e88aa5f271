"""The engine's stages as pipelines of datatrove, and the executors that run them."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shlex
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import ExactFindDedups
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets

from nemo_upcycle.data.engine import clean, near, overlap, quotas
from nemo_upcycle.data.engine.documents import ReadDocuments
from nemo_upcycle.data.engine.ledger import CountDocuments, CountText, Ledger, LedgerStep
from nemo_upcycle.data.engine.pii import ReplacePII
from nemo_upcycle.data.engine.tasks import EnginePlan
from nemo_upcycle.data.engine.tokenise import Tokenise
from nemo_upcycle.utils.files import write_json


@dataclass(frozen=True)
class EngineStage:
    """A pipeline and its number of tasks; datatrove records under `name` which tasks are complete."""

    name: str
    pipeline: list[Any]
    tasks: int


@dataclass(frozen=True)
class RunOn:
    """The place where the tasks run: this machine, a Slurm partition, or a Ray cluster.

    Args:
        workers: tasks at a time.
        slurm: name of the Slurm partition.
        time_limit: time limit of a Slurm job, in sbatch's format.
        ray: whether the tasks run on a Ray cluster.
        sbatch: other options of sbatch: name -> value.
        srun: other options of srun, as words.
        task_python: Python of the tasks' environment; Slurm's nodes must be able to read it. None means the Python of
            this process.
    """

    workers: int = 1
    slurm: str | None = None
    time_limit: str = "24:00:00"
    ray: bool = False
    sbatch: Mapping[str, str] = field(default_factory=dict)
    srun: tuple[str, ...] = ()
    task_python: str | None = None


class StartTask(LedgerStep):
    """Starts a task: opens its record, limits it to one thread (tasks run in parallel), and lets it open more files.

    datatrove's search for duplicates opens one file of every task at once.
    """

    type, name = "start", "task"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        """Begin the record."""
        for name in ("FASTOKENS_BPE_THREADS", "RAYON_NUM_THREADS"):
            os.environ.setdefault(name, "1")
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.ledger.begin(rank)


SIGN, COUNT, TAKE, WRITE = "1_sign", "2_count", "2_take", "3_write"
FIND, FIND_NEAR, JOIN, COMPARE, JUDGE = "2_find", "2_find_near", "2_join", "2_compare", "2_judge"


def tasks_of_stages(plan: EnginePlan) -> dict[str, int]:
    """Return the name and the number of tasks of every stage, in order."""
    tasks = len(plan.tasks)
    overlaps, near = plan.heldout_overlap is not None, plan.near_duplicates
    samples = any(task.max_tokens for task in plan.tasks)
    return {
        **({SIGN: tasks} if plan.deduplicate or overlaps or samples else {}),
        **({FIND: plan.finders} if plan.deduplicate else {}),
        **({FIND_NEAR: near["bands"]} if near else {}),
        **({JOIN: 1} if near or overlaps else {}),
        **({COMPARE: tasks, JUDGE: 1} if overlaps else {}),
        **({COUNT: tasks, TAKE: 1} if samples else {}),
        WRITE: tasks,
    }


def stages(plan: EnginePlan, library: str) -> list[EngineStage]:
    """Return the stages in order."""
    path, folder = plan.folder / "plan.json", plan.folder / "duplicates"
    ledger, unwritten = Ledger(path, is_kept=True), Ledger(path, is_kept=False)
    signatures, found = str(folder / "signatures"), str(folder / "found")
    find = ExactFindDedups(signatures, found, clean.deduplication(), lines_to_buffer=1024)
    sign: list[PipelineStep] = [*_documents(unwritten), clean.SignDocuments(unwritten, folder, plan.finders)]
    join: list[PipelineStep] = [StartTask(unwritten)]
    pipelines: dict[str, list[Any]] = {SIGN: sign, FIND: [StartTask(unwritten), find], JOIN: join}
    if plan.heldout_overlap is not None:
        sign.append(overlap.WriteHeldout(unwritten))
    if settings := plan.near_duplicates:
        config = MinhashConfig(settings["n_grams"], settings["bands"], settings["hashes_per_band"])
        signed, pairs = str(folder / "near_signatures"), str(folder / "near_pairs")
        buckets = MinhashDedupBuckets(signed, pairs, config=config, lines_to_buffer=1024)
        sign.append(near.SignNear(signed, config))
        pipelines[FIND_NEAR] = [StartTask(unwritten), buckets]
        join.append(near.KeepFirst(unwritten, folder))
    if plan.heldout_overlap is not None:
        join.append(overlap.IndexHeldout(unwritten))
        pipelines[COMPARE] = [*_deduplicated(unwritten, plan), overlap.CompareTraining(unwritten)]
        pipelines[JUDGE] = [StartTask(unwritten), overlap.JudgeHeldout(unwritten)]
    pipelines[COUNT] = [*_cleaned(unwritten, plan), quotas.CountTokens(unwritten, library)]
    pipelines[TAKE] = [StartTask(unwritten), quotas.TakeDocuments(unwritten)]
    counts = tasks_of_stages(plan)
    beyond = [clean.RemoveNumbered(ledger, "tokenise", quotas.BEYOND)] if TAKE in counts else []
    pipelines[WRITE] = [*_cleaned(ledger, plan), *beyond, Tokenise(ledger, library)]
    return [EngineStage(name, pipelines[name], tasks) for name, tasks in counts.items()]


def _cleaned(ledger: Ledger, plan: EnginePlan) -> list[PipelineStep]:
    """Return the steps that read documents and omit the documents that must not be written."""
    remove = clean.RemoveNumbered(ledger, "overlap", overlap.REMOVED)
    decontaminate: list[PipelineStep] = [clean.Decontaminate(ledger)] if plan.ngram_index else []
    if any(task.pii for task in plan.tasks):
        decontaminate.append(ReplacePII(ledger))
    return [
        *_deduplicated(ledger, plan),
        CountDocuments(ledger, "deduplicate"),
        *([remove] if plan.heldout_overlap is not None else []),
        CountDocuments(ledger, "overlap"),
        *decontaminate,
        CountDocuments(ledger, "decontaminate"),
    ]


def _deduplicated(ledger: Ledger, plan: EnginePlan) -> list[PipelineStep]:
    """Return the steps that read documents and omit duplicates."""
    if SIGN not in tasks_of_stages(plan):
        return _documents(ledger)
    check = clean.RequireSameDocuments(ledger, plan.folder / "duplicates")
    return [*_documents(ledger), check, clean.RemoveNumbered(ledger, "deduplicate", clean.DUPLICATES)]


def _documents(ledger: Ledger) -> list[PipelineStep]:
    read = [StartTask(ledger), ReadDocuments(ledger), CountDocuments(ledger, "read")]
    filters = [clean.RemoveShort(ledger), CountDocuments(ledger, "filter"), clean.RemoveListed(ledger)]
    return [*read, *filters, CountText(ledger)]


class _Local(LocalPipelineExecutor):
    """Raises an error when a worker is killed, for example for lack of memory; datatrove's own pool would hang."""

    def run(self) -> None:
        """Run the incomplete tasks.

        Raises:
            BrokenProcessPool: a worker was killed.
        """
        self.save_executor_as_json()
        # fork, so that die_with_parent applies to the workers, too
        pool = ProcessPoolExecutor(self.workers, mp_context=multiprocessing.get_context("fork"))
        for done in as_completed([pool.submit(self._run_task, rank) for rank in self.get_incomplete_ranks()]):
            done.result()
        pool.shutdown()

    def _run_task(self, rank: int) -> None:
        self._run_for_rank(rank)


class _Slurm(SlurmPipelineExecutor):
    """Records each job as soon as it is submitted, because a stage of more than a thousand tasks has several jobs."""

    def __init__(self, path: Path, srun: tuple[str, ...], folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.path = str(path)
        self.srun, self.folder = srun, str(folder)
        self.jobs: list[str] = []
        self.job_id_retriever = self._remember

    def _remember(self, answer: str) -> str:
        self.jobs.append(answer.split()[-1])
        write_json(Path(self.path), self.jobs)
        return self.jobs[-1]

    def get_launch_file_contents(self, sbatch_args: dict[str, Any], run_script: str) -> str:
        """Return the batch script; it starts datatrove by its full path, because a container has its own PATH."""
        srun, _, task = run_script.partition("launch_pickled_pipeline")
        srun = srun.replace("srun", shlex.join(["srun", *self.srun]), 1)
        started = shlex.quote(f"{self.folder}/launch_pickled_pipeline")
        return str(super().get_launch_file_contents(sbatch_args, f"{srun}{started}{task}"))

    def launch_merge_stats(self) -> None:
        """Skip the job that merges statistics, because it would stay queued after a failed stage."""


def executor(plan: EnginePlan, stage: EngineStage, run_on: RunOn) -> Any:
    """Return datatrove's executor for a stage.

    Args:
        plan: plan of the engine.
        stage: stage to run.
        run_on: place where the stage's tasks run.
    """
    shared = {"pipeline": stage.pipeline, "tasks": stage.tasks, "logging_dir": str(plan.folder / "logs" / stage.name)}
    if run_on.slurm:
        return _Slurm(
            slurm_jobs(plan),
            run_on.srun,
            Path(run_on.task_python or sys.executable).parent,
            **shared,
            time=run_on.time_limit,
            partition=run_on.slurm,
            qos="",  # datatrove's default is "normal"; `sbatch_args` or SBATCH_QOS may name another
            sbatch_args=dict(run_on.sbatch),
            workers=run_on.workers,
            job_name=f"data-{stage.name}",
        )
    if run_on.ray:
        return RayPipelineExecutor(**shared, workers=run_on.workers)
    return _Local(**shared, workers=min(run_on.workers, stage.tasks))


def slurm_jobs(plan: EnginePlan) -> Path:
    """Return the path of the file that holds Slurm's job numbers until their stage is complete."""
    return plan.folder / "logs" / "slurm_jobs.json"


def completed(plan: EnginePlan) -> int:
    """Return how many tasks of all stages are complete."""
    folders = [plan.folder / "logs" / name / "completions" for name in tasks_of_stages(plan)]
    return sum(len(os.listdir(folder)) for folder in folders if folder.is_dir())
