"""Runs of the demo's recipe with the tiny model, on real ranks."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from operator import attrgetter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from tests.distributed.ranks import run_ranks
from tests.functional.kills import arm
from tests.functional.tiny import prepare, shrink


class Send(pl.Callback):
    """Sends a signal to its own process on some ranks, at the start of a step; step -1 means before training."""

    def __init__(self, step: int, ranks: list[int], number: int = signal.SIGTERM) -> None:
        self.step, self.ranks, self.number = step, ranks, number

    def setup(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        self._send(trainer, -1)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._send(trainer, trainer.global_step)

    def _send(self, trainer: pl.Trainer, step: int) -> None:
        if step == self.step and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), self.number)


class Hang(pl.Callback):
    """Makes the last rank sleep forever in a step, but only the first time that the rank reaches the step."""

    def __init__(self, step: int, once: str) -> None:
        self.step, self.once = step, Path(once)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        last = trainer.global_rank == trainer.world_size - 1
        if last and trainer.global_step == self.step and not self.once.exists():
            self.once.touch()
            while True:
                signal.pause()


class Poison(pl.Callback):
    """Sets a weight of the last rank to NaN before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == trainer.world_size - 1:
            next(pl_module.parameters()).data.view(-1)[0] = float("nan")


class Record(pl.Callback):
    """Appends the hash of every training sample that a rank reads to that rank's file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data._train_ds = Recorded(data._train_ds, f"{self.path}.{trainer.global_rank}")


class Recorded:
    """A dataset that records each sample when it is read."""

    def __init__(self, dataset: Any, path: str) -> None:
        self.dataset, self.path = dataset, path

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Any:
        sample = self.dataset[number]
        with open(self.path, "a") as lines:
            lines.write(hashlib.sha256(sample["tokens"].numpy().tobytes()).hexdigest() + "\n")
        return sample


def tiny_recipe(parent: str, data: str, folder: str, options: dict[str, Any]) -> Any:
    """Return the demo's recipe for this process's ranks, shrunk, with the given inputs and run folder."""
    import nemo.utils
    import nemo_run as run

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.recipes import smollm2_135m_e8t2
    from nemo_upcycle.trainers.nemo.recipes import place_recipe

    use_cpu_backend()
    nemo.utils.logging.set_verbosity(nemo.utils.logging.ERROR)
    ranks = int(os.environ["WORLD_SIZE"])
    recipe = smollm2_135m_e8t2.pretrain_recipe(
        num_gpus_per_node=ranks, expert_parallelism=options.get("ep", 1), data=options.get("blend")
    )
    shrink(recipe, max_steps=options["steps"], checkpoint_every=options.get("every"))
    strategy = recipe.trainer.strategy
    strategy.tensor_model_parallel_size = options.get("tp", 1)
    strategy.sequence_parallel = options.get("tp", 1) > 1
    strategy.pipeline_model_parallel_size = options.get("pp", 1)
    for name, value in options.get("settings", {}).items():
        holder, _, field = name.rpartition(".")
        setattr(attrgetter(holder)(recipe), field, value)
    place_recipe(recipe, Path(folder), Path(parent), Path(options.get("blend", data)))
    if options.get("resilient"):
        from nemo_upcycle.trainers.nemo.paper_recipe import resilient

        every = recipe.log.ckpt.every_n_train_steps
        resilient(recipe).log.ckpt.every_n_train_steps = every
    for name, kind in {"record": Record, "send": Send, "hang": Hang, "poison": Poison}.items():
        if name in options:
            recipe.trainer.callbacks.append(run.Config(kind, **options[name]))
    return recipe


def train_rank(parent: str, data: str, folder: str, options: dict[str, Any]) -> None:
    """Build the recipe and call it, as `nemo llm pretrain` does on every rank."""
    import fiddle as fdl

    from nemo_upcycle.trainers.nemo.checks import check_recipe

    recipe = tiny_recipe(parent, data, folder, options)
    if every := options.get("validate_every"):
        trainer = recipe.trainer
        trainer.limit_val_batches, trainer.val_check_interval, trainer.num_sanity_val_steps = 1, every, 1
    check_recipe(recipe)
    recipe.trainer.strategy.ckpt_async_save = options.get("asynchronous", False)
    if "strike" in options:
        arm(options["strike"])
    fdl.build(recipe)()


def ending_of_rank(parent: str, data: str, folder: str, options: dict[str, Any]) -> tuple[Any, int]:
    """Train as `train_rank` does; return this rank's exit status or error, and the number of saved steps."""
    from nemo_upcycle.errors import UpcycleError
    from nemo_upcycle.trainers.nemo.stopping import step_kept

    try:
        train_rank(parent, data, folder, options)
        ending: Any = 0
    except SystemExit as error:
        ending = error.code
    except UpcycleError as error:
        ending = str(error)
    return ending, step_kept(Path(folder))


class Runs:
    """Runs of one parent on one blend."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parent, self.data = prepare(folder)

    def train(self, name: str, world_size: int, **options: Any) -> list[dict[str, Any]]:
        """Train, and return the lines of the run's metrics."""
        self._run(train_rank, name, world_size, options)
        return self.metrics(name)

    def endings(self, name: str, world_size: int, **options: Any) -> list[tuple[Any, int]]:
        """Train, and return each rank's exit status or error, and the number of saved steps that it finds."""
        return self._run(ending_of_rank, name, world_size, options)

    def _run(self, function: Any, name: str, world_size: int, options: dict[str, Any]) -> list[Any]:
        inputs = (str(self.parent), str(self.data), str(self.folder / name), options)
        return run_ranks(function, world_size, *inputs, process_group=False)

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Return the lines of a run's metrics."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
