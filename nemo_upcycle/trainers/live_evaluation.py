"""Score held-out texts and questions on the live model during training, with the same result as on its checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.data.finished import TOKENIZER, FinishedBlend
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.heldout import TASK, by_source, document_sums
from nemo_upcycle.trainers.facts import Evaluations
from nemo_upcycle.utils.files import MARKER, read_json, write_json
from nemo_upcycle.utils.progress import show_messages


FOLDER = "evaluation"


class LiveEvaluation:
    """Evaluates a model every few steps with a small suite, on the ranks and in the layout of the training.

    `evaluation/step=N.json` in the training's folder holds every item in the format of `nemo-upcycle evaluate`, so
    that two steps or two runs can be compared item by item. `metrics.jsonl` gets a line with `step`, `evaluation`
    (metric -> value, stderr), `sources` (source of held-out text -> bits per byte, stderr) and `seconds`. The texts
    are held out by the run's blend, and cut into pieces of at most one training sequence. No token is dropped,
    whatever the capacity factor. Evaluations do not change the training's state: a run gives the same weights with and
    without evaluations.

    Args:
        evaluations: settings of the evaluations; one evaluation comes before the first step, and one after the last
            step.
        folder: folder of the training.
        blend: data of the training.
        max_steps: number of steps of the training.
        restart_clock: function that excludes the time of an evaluation from the next step's time.
    """

    def __init__(
        self,
        evaluations: Evaluations,
        folder: Path,
        blend: FinishedBlend,
        max_steps: int,
        restart_clock: Callable[[], None],
    ) -> None:
        self._evaluations, self._folder, self._blend = evaluations, folder / FOLDER, blend
        self._max_steps, self._restart_clock = max_steps, restart_clock
        self._lm: Any = None

    def start(self, chunks: Sequence[Any], vocab_size: int, seq_length: int, step: int) -> None:
        """Build the suite and evaluate the model that the training starts from, on every rank.

        Args:
            chunks: chunks of the model on this rank, wrapped or not.
            vocab_size: V without padding.
            seq_length: tokens of a sequence.
            step: step that the training starts from.
        """
        from nemo_upcycle.evaluation.megatron.lm import MegatronLM

        self._lm = MegatronLM.live(chunks, self._blend.folder / TOKENIZER, vocab_size, seq_length)
        due = self._prepare(step)
        if due is None:
            self._lm = None
        elif due:
            self._evaluate(step)

    def after(self, step: int) -> None:
        """Evaluate after every few steps and after the last step, on every rank."""
        if self._lm is not None and self._is_due(step):
            self._evaluate(step)

    def _is_due(self, step: int) -> bool:
        return step % self._evaluations.every_n_steps == 0 or step == self._max_steps

    def _prepare(self, step: int) -> bool | None:
        """Build the suite on the first rank, and delete the scores of later steps that an abandoned start wrote.

        Returns:
            On all ranks, whether to score the step that the training starts from. This step has no scores if an
            earlier start was stopped right after the step's checkpoint. None if the suite cannot be built; the
            training then continues without evaluations.
        """
        found: list[bool | None] = [None]
        if torch.distributed.get_rank() == 0:
            try:
                self._build()
                for path in self._folder.glob("step=*.json"):
                    # The metrics lines of these steps were deleted, too.
                    if int(path.stem.removeprefix("step=")) > step or step == 0:
                        path.unlink()
                found = [self._is_due(step) and not (self._folder / f"step={step}.json").is_file()]
            except UpcycleError as error:
                show_messages().warning("no evaluation while training: %s", error)
        torch.distributed.broadcast_object_list(found)
        return found[0]

    def _build(self) -> None:
        from nemo_upcycle.data.suites.suite import build_named_suite
        from nemo_upcycle.data.suites.suite_config import read_suite_config

        suite = self._evaluations.suite
        if not (self._suite() / MARKER).is_file():
            if not read_suite_config(suite).local:
                raise UpcycleError(
                    field="suite",
                    got=suite,
                    expected="a suite of local tasks",
                    fix="set it to `watch`, or score the checkpoints with nemo-upcycle evaluate",
                )
            build_named_suite(suite, self._blend.heldout(), self._suite())

    def _suite(self) -> Path:
        """Return the suite's folder: a suite that was built before, or the run's own suite."""
        suite = Path(self._evaluations.suite)
        return suite if (suite / MARKER).is_file() else self._folder / "suite"

    def _evaluate(self, step: int) -> None:
        """Score the suite on the first rank with the help of the others. If scoring fails, warn and continue."""
        if torch.distributed.get_rank() > 0:
            self._lm.serve()
            return
        from nemo_upcycle.evaluation.backends import AskedBackend
        from nemo_upcycle.evaluation.run import ask

        start_s = time.monotonic()
        batch_size = self._evaluations.batch_size or read_json(self._suite() / MARKER)["config"]["batch_size"]
        self._lm.batch_size_per_gpu = batch_size
        model = AskedBackend("megatron", self._lm, {}, str(self._lm.device), batch_size)
        try:
            found = ask(model, self._suite(), samples=False, limit=self._evaluations.limit)
        except UpcycleError as error:
            show_messages().warning("step %d  not evaluated: %s", step, error)
            return
        finally:
            self._lm.close()
            self._restart_clock()
        write_json(self._folder / f"step={step}.json", {"name": f"step {step}", **found})
        values = {name: {"value": one["value"], "stderr": one["stderr"]} for name, one in found["metrics"].items()}
        seconds = time.monotonic() - start_s
        sources = by_source(document_sums(found)) if TASK in found["items"] else {}
        line = {"step": step, "evaluation": values, "sources": sources, "seconds": round(seconds, 3)}
        with (self._folder.parent / "metrics.jsonl").open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
        said = "  ".join(f"{name} {one['value']:.4f}" for name, one in values.items())
        show_messages().info("step %d/%d  %s  (%.1f s)", step, self._max_steps, said, seconds)
