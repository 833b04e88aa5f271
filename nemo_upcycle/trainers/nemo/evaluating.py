"""Score the live model while NeMo trains it."""

# Do not postpone annotations here, and use Optional: NeMo-Run needs annotations to parse overrides like
# `trainer.callbacks[5].every_n_steps=100`.

from pathlib import Path
from typing import Any, Optional

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from nemo.utils.app_state import AppState

from nemo_upcycle.data.blend_module import BlendDataModule
from nemo_upcycle.trainers.facts import Evaluations
from nemo_upcycle.trainers.live_evaluation import LiveEvaluation
from nemo_upcycle.trainers.nemo.metrics import MetricsLogger
from nemo_upcycle.utils.progress import show_messages


class EvaluateWhileTraining(Callback):
    """Evaluates the model every few steps with a small suite; see `LiveEvaluation`.

    Args:
        suite: name in `conf/evaluation`, YAML file, or folder of a suite that was built; all its tasks must be local.
        every_n_steps: steps between two evaluations; the model is also evaluated before the first and after the last
            step.
        limit: number of items to take from the start of each task; None: all.
        batch_size: sequences in one forward pass of a replica; None: the suite's batch size.

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
        self._live: Any = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Build the suite, and evaluate the model that the training starts from."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, BlendDataModule):
            show_messages().info("no evaluation while training: %s holds out no texts", type(data).__name__)
            return

        def restart_clock() -> None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, MetricsLogger):
                    callback.restart_clock()

        module: Any = pl_module
        evaluations = Evaluations(
            suite=self.suite, every_n_steps=self.every_n_steps, limit=self.limit, batch_size=self.batch_size
        )
        folder = Path(AppState().log_dir)
        self._live = LiveEvaluation(evaluations, folder, data.blend, trainer.max_steps, restart_clock)
        chunks = list(trainer.strategy.megatron_parallel)  # type: ignore[attr-defined]
        vocab_size = module.config.vocab_size or module.tokenizer.vocab_size
        self._live.start(chunks, vocab_size, data.seq_length, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate the model every `every_n_steps` steps, and after the last step."""
        if self._live is not None:
            self._live.after(trainer.global_step)
