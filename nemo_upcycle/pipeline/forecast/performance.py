"""The performance settings of a training, and where NVIDIA's recipes for its layout and precision differ."""

from __future__ import annotations

from nemo_upcycle.pipeline.forecast.training import TrainingForecast
from nemo_upcycle.planning.search import Plan, usual_dispatcher, usual_overlap
from nemo_upcycle.trainers.base import TrainingFacts
from nemo_upcycle.trainers.commands import BRIDGE_PRECISIONS
from nemo_upcycle.trainers.layout import usual_communication


#: Overlaps of the planner, as people read them.
_OVERLAPS = {"tp": "tensor parallelism", "ep": "experts"}
_NONE, _STEP = "none", "a whole step"


def performance_settings(training: TrainingForecast) -> dict[str, str]:
    """Return the settings by name, each with NVIDIA's where that differs and the kind of GPU is known."""
    own = _in_force(training.facts)
    usual = _nvidia(training.facts, training.later) if training.later else {}
    return {
        name: value if usual.get(name, value) == value else f"{value}; NVIDIA: {usual[name]}"
        for name, value in own.items()
    }


def _in_force(facts: TrainingFacts) -> dict[str, str]:
    profile = facts.profile
    again = facts.recompute
    if facts.first_steps:
        again += f" in the first {facts.first_steps:,} steps, then none"
    graphs = _STEP if "launch" in facts.overlap else "parts of a step" if profile.cuda_graphs else _NONE
    return {
        "precision": profile.precision,
        "weights gathered": profile.precision if facts.low_params else "bf16",
        "gradients": facts.gradients,
        "overlap": _overlaps(facts.communication, facts.overlap),
        "dispatcher": profile.dispatcher if facts.arch.num_experts else "",
        "recompute": again,
        "CUDA graphs": graphs,
    }


def _nvidia(facts: TrainingFacts, plan: Plan) -> dict[str, str]:
    """List the settings of NVIDIA's recipes without precision, and with recomputation only if a model needs it."""
    arch, layout, work, gpu = facts.arch, plan.layout, plan.work, plan.request.gpu
    overlap = usual_overlap(arch, gpu, layout, work, work.recompute, facts.software)
    dispatcher = usual_dispatcher(arch, gpu, layout, work)
    communication = tuple(name for name, is_on in usual_communication(layout).items() if is_on)
    settings = {
        "weights gathered": work.precision if work.precision in BRIDGE_PRECISIONS[True] else "bf16",
        "gradients": "bf16",
        "overlap": _overlaps(communication, overlap),
    }
    if arch.num_experts and layout.ep * layout.etp > 1:
        settings["dispatcher"] = dispatcher
    return settings | ({"CUDA graphs": _STEP} if "launch" in overlap else {})


def _overlaps(communication: tuple[str, ...], overlap: tuple[str, ...]) -> str:
    names = (*communication, *(_OVERLAPS[name] for name in overlap if name in _OVERLAPS))
    return ", ".join(names) or _NONE
