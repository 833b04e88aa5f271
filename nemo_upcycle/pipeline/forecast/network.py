"""Forecast which stages need a network, and for what."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_upcycle.data.needs import HUB, Caches
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.base import Cluster, hub_variables
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.needs import run_needs
from nemo_upcycle.pipeline.plan import Stage
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.trainers.facts import TrainingFacts
from nemo_upcycle.utils.cache import CACHE_VARIABLE
from nemo_upcycle.utils.files import MARKER


#: Variables that keep huggingface_hub off the network, and the values that switch these variables on.
_OFFLINE, _TRUE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), ("1", "ON", "YES", "TRUE")


@dataclass(frozen=True)
class NetworkForecast:
    """Items that stages fetch from networks because their caches lack them.

    Attributes:
        stages: items that the stages fetch, by stage and by place, in the order of the stages. Stages that need no
            network are omitted.
        command: command that fetches everything beforehand; several commands are joined by &&.
        offline: items that a stage lacks and cannot fetch, by stage. A variable keeps such a stage off the Hugging
            Face hub.
    """

    stages: Mapping[str, Mapping[str, Sequence[str]]]
    command: str
    offline: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def problems(self) -> tuple[UpcycleError, ...]:
        """Errors of the stages that lack items and cannot fetch them."""
        variables = " or ".join(f"{name}=1" for name in _OFFLINE)
        fix = f"type `{self.command}` on a machine with a network, or unset the variable"
        return tuple(
            UpcycleError(
                stage, kind="missing", got=f"needs {', '.join(what)}, and {variables} forbids downloads", fix=fix
            )
            for stage, what in self.offline.items()
        )


def forecast_network(
    stages: Sequence[Stage],
    plan: RunPlan,
    cluster: Cluster | None,
    jobs: Mapping[str, Job],
    facts: Mapping[str, TrainingFacts | None] | None = None,
) -> NetworkForecast:
    """List everything that the stages of a run fetch. Use no network, only the caches on this machine.

    Args:
        stages: stages that run.
        plan: plan of the run.
        cluster: cluster that runs the stages; None for this machine.
        jobs: job of each stage, by stage.
        facts: known facts of each training, by stage.
    """
    found, offline, needs = {}, {}, plan.needs
    fetched, commands = {need.what for need in needs}, [_fetch(plan, "dense", "data", "evaluation")]
    for stage in stages:
        variables = _variables(cluster, jobs[stage.name]) if cluster else os.environ
        known = (facts or {}).get(stage.name)
        caches = Caches.of(variables)
        own = [need for need in needs if set(need.inputs) & set(stage.settings)]
        suite = known.evaluations.suite if known and known.evaluations else ""
        asked = run_needs(Inputs("", "", suite)) if suite and not (Path(suite) / MARKER).is_file() else []
        if {need.what for need in asked} - fetched:
            commands.append(_fetch(replace(plan, evaluation=suite), "evaluation"))
        places: dict[str, list[str]] = {}
        missing = [need for need in (*own, *asked) if not need.is_in(caches)]
        for need in missing:
            places.setdefault(need.place, []).append(need.what)
        on_hub = [need.what for need in missing if need.place == HUB and need.is_certain]
        if on_hub and any(str(variables.get(name, "")).upper() in _TRUE for name in _OFFLINE):
            offline[stage.name] = on_hub
        if known and known.uses_wandb and variables.get("WANDB_MODE", "online") == "online":
            places["Weights & Biases"] = ["metrics (the variable WANDB_MODE=offline keeps them in files)"]
        if places:
            found[stage.name] = places
    return NetworkForecast(found, " && ".join(dict.fromkeys(commands)), offline)


def _fetch(plan: RunPlan, *inputs: str) -> str:
    return shlex.join(["nemo-upcycle", "fetch", "DIR", *(f"{name}={getattr(plan, name)}" for name in inputs)])


def _variables(cluster: Cluster, job: Job) -> dict[str, Any]:
    """Return the known variables of a job. The caches in a container's image count as empty."""
    settings = cluster.settings_for(job.name)
    given = {name: value for name, value in (getattr(settings, "env_vars", None) or {}).items() if value is not None}
    if cluster.has_container(settings):
        return {CACHE_VARIABLE: os.devnull, **hub_variables(job, given), **given}
    return {**os.environ, **given}
