"""Forecast the cost of evaluation during training: the texts of its suite, and at most the time that they take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from nemo_upcycle.planning.search import Plan
from nemo_upcycle.suites.local_tasks import is_answers, is_text
from nemo_upcycle.suites.suite_config import SuiteConfig, read_suite_config
from nemo_upcycle.trainers.base import Evaluations
from nemo_upcycle.utils.files import MARKER


#: Bytes of a token of English text, at least: tokenizers of Llama's kind take four and more.
_TOKEN_BYTES = 3
_CHOICES = 4
#: Of a conversation up to an answer and with it, of most.
_ANSWER_TOKENS = 1024
#: Characters of the longest question of MMLU with its answers, and of what a prompt puts around a question, at most.
_LONGEST_QUESTION, _PROMPT = 4844, 150


@dataclass(frozen=True)
class EvaluationForecast:
    """What a training evaluates on its way.

    Args:
        suite: name of the suite.
        every_n_steps: steps from one evaluation to the next.
        texts: the texts that are passed each time, at most; None: all that the blend has.
        seconds: the seconds of one evaluation, at most; None: not known.
        share: the share of the training's time, at most; None: not known.
    """

    suite: str
    every_n_steps: int
    texts: int | None
    seconds: float | None
    share: float | None


def forecast_evaluation(evaluations: Evaluations | None, plan: Plan | None) -> EvaluationForecast | None:
    """Estimate the cost of a training's evaluations; None without any, or of a suite's folder.

    Every pass is taken to be as long as its longest text, in a pipeline that holds no other one.

    Args:
        evaluations: the evaluations of the training.
        plan: the plan of its usual steps, None without an estimate.
    """
    if evaluations is None or (Path(evaluations.suite) / MARKER).is_file():
        return None
    config = read_suite_config(evaluations.suite)
    parts = list_texts(config, evaluations.limit)
    texts = None if parts is None else sum(count for count, _ in parts)
    batch, every_n_steps = evaluations.batch_size or config.batch_size, evaluations.every_n_steps
    seconds = share = None
    if plan and parts is not None and not isinstance(batch, str):
        layout, sequence = plan.layout, plan.work.seq_length
        micro_batches = plan.work.global_batch / layout.dp / layout.micro_batch
        # Forward alone is a third of forward and backward.
        stage_s = plan.time.total / (micro_batches + (layout.pp - 1) / layout.vp) / 3
        token_s = layout.pp * stage_s / (layout.micro_batch * sequence)
        seconds = 0.0
        for count, tokens in parts:
            pieces = math.ceil(tokens / sequence)  # a longer text is cut
            passes = math.ceil(count * pieces / (batch * layout.dp))
            seconds += passes * batch * min(sequence, tokens) * token_s
        share = seconds / (every_n_steps * plan.time.total)
    return EvaluationForecast(evaluations.suite, every_n_steps, texts, seconds, share)


def list_texts(config: SuiteConfig, limit: int | None) -> list[tuple[int, int]] | None:
    """Return number and tokens, at most, of the texts of each task; None without a bound of their number."""
    if not config.local:
        return None
    parts = []
    for task, shots in ((task, shots) for task, numbers in config.tasks.items() for shots in numbers):
        most = config.heldout.windows if is_text(task) else config.questions.total
        most = config.heldout.answers if is_answers(task) else most
        bounds = [bound for bound in (most, limit) if bound is not None]
        if not bounds:
            return None
        if is_text(task):
            parts.append((min(bounds), config.heldout.window_bytes // _TOKEN_BYTES))
        elif is_answers(task):
            parts.append((min(bounds), _ANSWER_TOKENS))
        else:
            characters = (config.questions.max_characters or _LONGEST_QUESTION) + _PROMPT
            parts.append((_CHOICES * min(bounds), (1 + shots) * characters // _TOKEN_BYTES))
    return parts
