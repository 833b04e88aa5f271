"""The forecast of one training: sizes, memory, speed, checkpoints, and the cost of a kill."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.pipeline.executors.ft import USUAL_GIB_S, USUAL_RESTART_S
from nemo_upcycle.pipeline.executors.jobs import SaveLimit
from nemo_upcycle.pipeline.forecast.recipe_to_plan import gpu_of_training, plans_of
from nemo_upcycle.pipeline.forecast.stages import TIME, StageForecast, State
from nemo_upcycle.planning.failures import USUAL_GPU_HOURS, best_interval_s, goodput
from nemo_upcycle.planning.hardware import Gpu
from nemo_upcycle.planning.memory import GIB
from nemo_upcycle.planning.search import LayoutEstimate
from nemo_upcycle.trainers.facts import TrainingFacts
from nemo_upcycle.utils.validation import check_number


#: Largest factor by which the truth may differ from an estimate of memory or time (docs/planning.md).
WORST_ERROR = 1.25
_TIME_LIMIT = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


@dataclass(frozen=True)
class TrainingForecast:
    """Everything known about a training before it starts.

    Args:
        stage: forecast of its stage.
        facts: facts of the training.
        gpu: the planner's GPU; None if the training has no GPU or the planner does not know the GPU.
        gpu_origin: how the kind of GPU was found, or why `gpu` is None.
        first, later: plans of the first steps and of the later steps; both None without an estimate.
        no_plan: why there is no estimate of memory and speed.
        price: price of a GPU-hour, in the user's currency; None if it is unknown.
        limit_s: time limit of a job (seconds); None if it is unknown.
        write_gib_s: write speed of the run folder's file system (GiB/s).
        gpu_hours_between_failures: mean GPU-hours between two failures.
        restart_s: time from a failure to the next step (seconds).
        restart_origin: how `restart_s` is known: given, measured or assumed.
    """

    stage: StageForecast
    facts: TrainingFacts
    gpu: Gpu | None
    gpu_origin: str
    first: LayoutEstimate | None
    later: LayoutEstimate | None
    no_plan: str
    price: float | None
    limit_s: float | None
    write_gib_s: float
    gpu_hours_between_failures: float
    restart_s: float
    restart_origin: str

    @property
    def tokens(self) -> int:
        """Tokens of the whole training."""
        return self.facts.step_tokens * self.facts.steps

    @property
    def steps_left(self) -> int:
        """Steps still to do."""
        finding = self.stage.finding
        return 0 if finding.state is State.DONE else max(0, self.facts.steps - finding.steps_done)

    @property
    def fullest(self) -> LayoutEstimate | None:
        """Plan of the steps that need the most memory."""
        return max((plan for plan in (self.first, self.later) if plan), key=lambda p: p.memory.total, default=None)

    @property
    def memory_gib(self) -> float:
        """Memory of the fullest GPU (GiB); 0 without an estimate."""
        return self.fullest.memory.total / GIB if self.fullest else 0.0

    def _time_s(self, steps: int, first_steps: int) -> float | None:
        """Return the time of `steps` (seconds); the first `first_steps` of them take the time of the plan `first`."""
        if self.first is None or self.later is None:
            return None
        return first_steps * self.first.time.total + (steps - first_steps) * self.later.time.total

    @property
    def seconds_left(self) -> float | None:
        """Seconds of the steps still to do; None without an estimate."""
        first_steps = max(0, self.facts.computation.first_steps - self.stage.finding.steps_done)
        return self._time_s(self.steps_left, min(self.steps_left, first_steps))

    @property
    def gpu_hours_left(self) -> float | None:
        """GPU-hours of the steps still to do."""
        return None if self.seconds_left is None else self.seconds_left / 3600 * self.facts.layout.gpus

    @property
    def cost_left(self) -> float | None:
        """Cost of the steps still to do; None without a price or an estimate."""
        return None if self.price is None or self.gpu_hours_left is None else self.price * self.gpu_hours_left

    @property
    def jobs_left(self) -> int | None:
        """Number of jobs for the remaining steps without interruptions; None without a time limit or an estimate."""
        if self.limit_s is None or self.seconds_left is None:
            return None
        return math.ceil(self.seconds_left / self.limit_s)

    @property
    def is_too_large(self) -> bool:
        """Whether the memory of a GPU is too small by the estimate."""
        return self.fullest is not None and self.fullest.verdict == "no"

    @property
    def is_far_too_large(self) -> bool:
        """Whether the memory of a GPU is too small even if the estimate has its largest error."""
        return self.fullest is not None and self.memory_gib > WORST_ERROR * self.fullest.request.gpu.memory_gib

    def time_needed_s(self, limit_s: float) -> float | None:
        """Return the time that a job needs (seconds) if its limit is far too short; None if the limit is long enough.

        Args:
            limit_s: time limit of a job (seconds).
        """
        if self.seconds_left is None or self.seconds_left <= limit_s:
            return None
        if not self.stage.is_requeued:
            return self.seconds_left if self.seconds_left > WORST_ERROR * limit_s else None
        # A signal tells the job to stop some seconds before its end (the save limit). The job also needs time for one
        # step before this signal.
        needed_s = min((limit.seconds for limit in self.stage.save_limits), default=0) + self.slowest_step_s
        return needed_s if needed_s >= limit_s else None

    @property
    def checkpoints_kept(self) -> int:
        """Checkpoints that stay after the training has ended."""
        saves = math.ceil(self.facts.steps / self.facts.saving.every_n_steps)
        return saves if self.facts.saving.keeps is None else min(saves, self.facts.saving.keeps)

    @property
    def checkpoints_at_once(self) -> int:
        """Checkpoints on the disk while the last one is written."""
        return min(math.ceil(self.facts.steps / self.facts.saving.every_n_steps), self.checkpoints_kept + 1)

    @property
    def slowest_step_s(self) -> float:
        """Time of the slowest step (seconds); an early save waits for the step's end. 0 without an estimate."""
        return max((plan.time.total for plan in (self.first, self.later) if plan), default=0.0)

    def save_gib_s(self, limit: SaveLimit) -> float:
        """Return the write speed (GiB/s) at which a save ends within a limit."""
        rest_s = limit.seconds - self.slowest_step_s
        return self.facts.checkpoint_bytes / GIB / rest_s if rest_s > 0 else math.inf

    @property
    def save_s(self) -> float:
        """Time of a save (seconds)."""
        return self.facts.checkpoint_bytes / GIB / self.write_gib_s

    @property
    def early_save_s(self) -> int:
        """Time of a step and a save (seconds), rounded up to whole minutes."""
        return math.ceil((self.slowest_step_s + self.save_s) / 60) * 60

    @property
    def longest_loss_s(self) -> float | None:
        """Time of the lost work (seconds) if a kill comes just before a checkpoint; None without an estimate."""
        lost = min(self.facts.saving.every_n_steps, self.facts.steps)
        losses = [self._time_s(lost, count) for count in (0, min(lost, self.facts.computation.first_steps))]
        return max((loss for loss in losses if loss is not None), default=None)

    @property
    def between_failures_s(self) -> float:
        """Mean time between two failures of the job (seconds)."""
        return self.gpu_hours_between_failures / self.facts.layout.gpus * 3600

    def goodput(self, every_n_steps: int) -> float | None:
        """Return the share of the time that is spent on steps which are kept; None without an estimate.

        Args:
            every_n_steps: steps between two saves.
        """
        if (interval_s := self._time_s(every_n_steps, 0)) is None:
            return None
        is_async = self.facts.saving.is_async
        return goodput(interval_s, self.save_s, self.restart_s, self.between_failures_s, is_async=is_async)

    @property
    def best_every_n_steps(self) -> int | None:
        """Steps between two saves with the highest goodput, to two significant digits; None without an estimate."""
        if self.later is None:
            return None
        best_s = best_interval_s(self.save_s, self.between_failures_s, is_async=self.facts.saving.is_async)
        steps = max(1.0, best_s / self.later.time.total)
        digit = 10 ** max(0, math.floor(math.log10(steps)) - 1)
        return min(self.facts.steps, digit * math.ceil(steps / digit))

    @property
    def seconds_with_failures(self) -> float | None:
        """Expected seconds of the remaining steps, with saves, failures and lost work; None without an estimate."""
        share = self.goodput(min(self.facts.saving.every_n_steps, self.facts.steps))
        return self.seconds_left / share if self.seconds_left is not None and share else None


def forecast_training(
    facts: TrainingFacts, stage: StageForecast, executor: Any = None, measured_restart_s: float | None = None
) -> TrainingForecast:
    """Forecast a training.

    Args:
        facts: facts of the training.
        stage: forecast of its stage.
        executor: executor of the training; may have a `price_per_gpu_hour`, a `write_gib_s` and a `card`. None stands
            for this machine.
        measured_restart_s: set-up time of the training's last job (seconds); None if it is unknown.

    Raises:
        SpecError: `write_gib_s` is not a speed.
    """
    write_gib_s = getattr(executor, "write_gib_s", USUAL_GIB_S)
    check_number("run.executor.write_gib_s", write_gib_s, 0.001)
    restart_s, origin = getattr(executor, "restart_s", USUAL_RESTART_S), "given"
    if restart_s == USUAL_RESTART_S:
        restart_s, origin = (measured_restart_s, "measured") if measured_restart_s else (restart_s, "assumed")
    gpu, gpu_origin = gpu_of_training(facts.profile.accelerator, executor, stage.resources)
    plans: tuple[LayoutEstimate | None, LayoutEstimate | None] = None, None
    no_plan = "" if gpu else gpu_origin
    if gpu:
        try:
            plans = plans_of(facts, gpu)
        except SpecError as error:
            no_plan = f"the planner refuses: {error}"
    return TrainingForecast(
        stage=stage,
        facts=facts,
        gpu=gpu,
        gpu_origin=gpu_origin,
        first=plans[0],
        later=plans[1],
        no_plan=no_plan,
        price=getattr(executor, "price_per_gpu_hour", None),
        limit_s=time_limit_s(stage.resources.get(TIME, "")),
        write_gib_s=write_gib_s,
        gpu_hours_between_failures=getattr(executor, "gpu_hours_between_failures", None) or USUAL_GPU_HOURS,
        restart_s=restart_s,
        restart_origin=origin,
    )


def time_limit_s(text: str) -> float | None:
    """Convert a time limit to seconds, from Slurm's form or from a number followed by s; return None for other texts.

    Example:
        >>> [time_limit_s(text) for text in ("4:00:00", "1-12", "1-12:30", "90", "30:15", "3600s", "infinite")]
        [14400.0, 129600.0, 131400.0, 5400.0, 1815.0, 3600.0, None]
    """
    if re.fullmatch(r"\d+ ?s", text):
        return float(text.rstrip(" s"))
    match = _TIME_LIMIT.fullmatch(text)
    if not match:
        return None
    numbers = [int(part) for part in match["parts"].split(":")]
    # The numbers after the days are hours, minutes and seconds. Without days, one number is minutes, two numbers are
    # minutes and seconds, and three numbers are hours, minutes and seconds.
    if match["days"] is not None:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, minutes, seconds = (0, *(*numbers, 0)[:2])
    return float(((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds)
