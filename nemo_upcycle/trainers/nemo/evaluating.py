"""Score held-out texts and questions on the live model while it trains, as its checkpoint would be scored later."""

# No postponed annotations, and Optional: NeMo-Run parses `trainer.callbacks[5].every_n_steps=100` by them.

import json
import time
from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from nemo.utils.app_state import AppState

from nemo_upcycle.data.blend_module import BlendDataModule
from nemo_upcycle.data.finished import TOKENIZER, FinishedBlend
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.heldout import TASK, by_source, document_sums
from nemo_upcycle.trainers.nemo.metrics import MetricsLogger
from nemo_upcycle.utils.files import MARKER, read_json, write_json
from nemo_upcycle.utils.progress import show_messages


FOLDER = "evaluation"


class EvaluateWhileTraining(Callback):
    """Evaluates the model every few steps with a small suite, on the ranks and in the layout that train it.

    `evaluation/step=N.json` in the run's log folder holds every item, as `nemo-upcycle evaluate` writes it: two steps
    or two runs can be compared item by item. `metrics.jsonl` gets a line with `step`, `evaluation` (metric -> value,
    stderr), `sources` (source of held-out text -> bits per byte, stderr) and `seconds`. The texts are what the run's
    blend holds out; one longer than a sequence of the training is cut into such. No token is dropped, whatever the
    capacity factor, nothing of the training's state is changed, and a run gives the same bits with it and without it.

    Args:
        suite: a name in `conf/evaluation`, a YAML file, or the folder of a suite that was built; of local tasks alone.
        every_n_steps: steps between two evaluations; there is one before the first step, and one after the last.
        limit: take only the first items of each task.
        batch_size: sequences in one pass of a replica; None takes the suite's.

    Example:
        >>> recipe.trainer.callbacks.append(run.Config(EvaluateWhileTraining, every_n_steps=100))  # doctest: +SKIP
    """

    def __init__(
        self,
        suite: str = "watch",
        every_n_steps: int = 500,
        limit: Optional[int] = None,  # noqa: UP045
        batch_size: Optional[int] = None,  # noqa: UP045
    ) -> None:
        self.suite, self.every_n_steps, self.limit, self.batch_size = suite, every_n_steps, limit, batch_size
        self._lm: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the suite, and evaluate what the training starts from."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, BlendDataModule):
            show_messages().info("no evaluation while training: %s holds out no texts", type(data).__name__)
            return
        from nemo_upcycle.evaluation.megatron.lm import MegatronLM

        blend = data.blend
        module: Any = pl_module
        self._lm = MegatronLM.live(
            list(trainer.strategy.megatron_parallel),  # type: ignore[attr-defined]
            blend.folder / TOKENIZER,
            module.config.vocab_size or module.tokenizer.vocab_size,
            data.seq_length,
        )
        due = self._prepare(trainer.global_step, trainer.max_steps, blend)
        if due is None:
            self._lm = None
        elif due:
            self._evaluate(trainer, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate after every few steps, and after the last."""
        step = trainer.global_step
        if self._lm is not None and self._is_due(step, trainer.max_steps):
            self._evaluate(trainer, step)

    def _is_due(self, step: int, max_steps: int) -> bool:
        return step % self.every_n_steps == 0 or step == max_steps

    def _prepare(self, step: int, max_steps: int, blend: FinishedBlend) -> Optional[bool]:  # noqa: UP045
        """Build the suite, and forget what an abandoned start has scored after this step, on the first rank.

        Returns:
            On all ranks whether the step that the training starts from is to be scored, which a stop after its
            checkpoint may have left undone; None where no suite can be built: the training goes on without.
        """
        found: list[Optional[bool]] = [None]  # noqa: UP045
        if torch.distributed.get_rank() == 0:
            try:
                self._build(blend)
                for path in self._folder().glob("step=*.json"):
                    if int(path.stem.removeprefix("step=")) > step or step == 0:  # whose line of metrics is gone, too
                        path.unlink()
                found = [self._is_due(step, max_steps) and not (self._folder() / f"step={step}.json").is_file()]
            except UpcycleError as error:
                show_messages().warning("no evaluation while training: %s", error)
        torch.distributed.broadcast_object_list(found)
        return found[0]

    def _build(self, blend: FinishedBlend) -> None:
        from nemo_upcycle.suites.suite import build_named_suite
        from nemo_upcycle.suites.suite_config import read_suite_config

        if not (self._suite() / MARKER).is_file():
            if not read_suite_config(self.suite).local:
                raise UpcycleError(
                    "suite", got=self.suite, expected="one of local tasks", fix="name watch, or score checkpoints"
                )
            build_named_suite(self.suite, blend.heldout(), self._suite())

    def _suite(self) -> Path:
        """Return the suite's folder: one that was built before, or the run's own."""
        return Path(self.suite) if (Path(self.suite) / MARKER).is_file() else self._folder() / "suite"

    def _folder(self) -> Path:
        return Path(AppState().log_dir) / FOLDER

    def _evaluate(self, trainer: pl.Trainer, step: int) -> None:
        """Ask on the first rank, serve on the others. What cannot be scored is said, and the training goes on."""
        if torch.distributed.get_rank() > 0:
            self._lm.serve()
            return
        from nemo_upcycle.evaluation.backends import AskedBackend
        from nemo_upcycle.evaluation.run import ask

        start_s = time.monotonic()
        batch_size = self.batch_size or read_json(self._suite() / MARKER)["config"]["batch_size"]
        self._lm.batch_size_per_gpu = batch_size
        model = AskedBackend("megatron", self._lm, {}, str(self._lm.device), batch_size)
        try:
            found = ask(model, self._suite(), samples=False, limit=self.limit)
        except UpcycleError as error:
            show_messages().warning("step %d  not evaluated: %s", step, error)
            return
        finally:
            self._lm.close()
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, MetricsLogger):
                    callback.restart_clock()
        write_json(self._folder() / f"step={step}.json", {"name": f"step {step}", **found})
        values = {name: {"value": one["value"], "stderr": one["stderr"]} for name, one in found["metrics"].items()}
        seconds = time.monotonic() - start_s
        sources = by_source(document_sums(found)) if TASK in found["items"] else {}
        line = {"step": step, "evaluation": values, "sources": sources, "seconds": round(seconds, 3)}
        with (self._folder().parent / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        said = "  ".join(f"{name} {one['value']:.4f}" for name, one in values.items())
        show_messages().info("step %d/%d  %s  (%.1f s)", step, trainer.max_steps, said, seconds)
