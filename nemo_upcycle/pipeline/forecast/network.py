"""Which stages need a network, and for what."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_upcycle.data.needs import Caches
from nemo_upcycle.data.network import run_needs
from nemo_upcycle.pipeline.executors.base import Cluster, Job, hub_variables
from nemo_upcycle.pipeline.plan import Stage
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.utils.cache import CACHE_VARIABLE


@dataclass(frozen=True)
class NetworkForecast:
    """What stages take from networks, as far as it is not in their caches.

    Attributes:
        stages: by name, in their order: from which place, and what; none that needs no network.
        command: that fetches all of it beforehand.
    """

    stages: Mapping[str, Mapping[str, Sequence[str]]]
    command: str


def forecast_network(
    stages: Sequence[Stage], plan: RunPlan, cluster: Cluster | None, jobs: Mapping[str, Job]
) -> NetworkForecast:
    """Return what stages that run take from networks; asks none, and looks for caches where this machine sees them.

    Args:
        stages: those that run.
        plan: what they are given.
        cluster: where they run; None: on this machine.
        jobs: by stage, what is asked of it.
    """
    needs, found = run_needs(*plan.inputs()), {}
    for stage in stages:
        caches = Caches.of(_variables(cluster, jobs[stage.name]) if cluster else os.environ)
        places: dict[str, list[str]] = {}
        for need in needs:
            if set(need.inputs) & set(stage.settings) and not need.is_in(caches):
                places.setdefault(need.place, []).append(need.what)
        if places:
            found[stage.name] = places
    inputs = [f"{name}={getattr(plan, name)}" for name in ("dense", "data", "evaluation")]
    return NetworkForecast(found, shlex.join(["nemo-upcycle", "fetch", "DIR", *inputs]))


def _variables(cluster: Cluster, job: Job) -> dict[str, Any]:
    """Return the environment of a job, as far as it names caches; a container's own holds nothing."""
    settings = cluster.settings_for(job.name)
    given = {name: value for name, value in (getattr(settings, "env_vars", None) or {}).items() if value is not None}
    if cluster.has_container(settings):
        return {CACHE_VARIABLE: os.devnull, **hub_variables(job, given), **given}
    return {**os.environ, **given}
