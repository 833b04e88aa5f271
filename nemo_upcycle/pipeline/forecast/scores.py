"""Forecast when a run has its scores: those of models in training, and those of the evaluation after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nemo_upcycle.pipeline.forecast.evaluating import list_texts
from nemo_upcycle.pipeline.forecast.stages import StageForecast
from nemo_upcycle.pipeline.forecast.training import TrainingForecast
from nemo_upcycle.pipeline.inputs import Inputs


_EVALUATE = "evaluate"


@dataclass(frozen=True)
class ScoreForecast:
    """How long a run takes to its scores, from the first step on; queues and other stages come on top.

    Args:
        suite: the suite that all models are asked at the end.
        trainings_s: seconds of the trainings with their evaluations; None: not known.
        evaluation_s: seconds of the evaluation of all models at the end; None: not known.
    """

    suite: str
    trainings_s: float | None
    evaluation_s: float | None


def forecast_scores(
    inputs: Inputs, stages: Sequence[StageForecast], trainings: Mapping[str, TrainingForecast], *, is_parallel: bool
) -> ScoreForecast | None:
    """Forecast when the last scores will be there; None if no evaluation is to come or the trainings are not known.

    A text is taken to be read in a third of the time that a GPU trains on it, on as many GPUs as the stage has ranks:
    the upcycled model before and after its training at its own speed, parent and baseline at the baseline's.

    Args:
        inputs: inputs of the run.
        stages: forecasts of the stages.
        trainings: stage -> forecast of its training.
        is_parallel: whether the trainings run at the same time.
    """
    stage = next((stage for stage in stages if stage.name == _EVALUATE and stage.runs), None)
    if stage is None or not trainings:
        return None
    seconds = [training.scored_s for training in trainings.values() if training.stage.runs]
    known = [one for one in seconds if one is not None]
    trainings_s = (max(known, default=0.0) if is_parallel else sum(known)) if len(known) == len(seconds) else None
    texts = list_texts(inputs.suite_config, None)
    plans = [training.later for training in trainings.values()]
    evaluation_s = None
    if texts is not None and None not in plans:
        models = (2, 2) if len(plans) > 1 else (3,)
        token_s = sum(count / plan.tokens_per_s_per_gpu / 3 for count, plan in zip(models, plans, strict=True) if plan)
        evaluation_s = sum(count * length for count, length in texts) * token_s / (stage.nodes * stage.ranks_per_node)
    return ScoreForecast(inputs.suite, trainings_s, evaluation_s)
