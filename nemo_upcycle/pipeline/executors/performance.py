"""NVIDIA's performance settings for a training, looked up in `conf/performance.yaml` by GPU and layout."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.utils.conf import packaged, read_yaml


#: Path of the table, as messages name it.
TABLE = "conf/performance.yaml"
ENVIRONMENT, SLURM = "environment", "slurm"
NUMACTL, SEGMENT = "numactl", "--segment"
#: Shell line that binds a rank to a memory node. The line binds nothing if numactl is missing, or if Slurm gave the
#: rank cores of another memory node.
_BIND = (
    'bind="numactl --cpunodebind=$((SLURM_LOCALID/%s)) --membind=$((SLURM_LOCALID/%s))"; '
    '$bind true >/dev/null 2>&1 || bind=; exec $bind "$@"'
)


@lru_cache
def table() -> Any:
    """Return the table as plain values."""
    return read_yaml(packaged("performance.yaml"))


def names() -> set[str]:
    """Return the names of all settings of the table."""
    return {row["name"] for part in (ENVIRONMENT, SLURM) for row in table()[part]}


def performance_settings(
    job: Job,
    card: str,
    *,
    scheduler: str = "",
    container: bool = False,
    changed: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """Look up a job's performance settings. A name is a variable, an srun option such as `--mpi`, or `numactl`.

    The value of an option without a value is an empty text. Only trainings have performance settings.

    Args:
        job: job of the stage.
        card: kind of GPU of the job's nodes.
        scheduler: part of the table whose settings are added to the variables; empty if nothing is added.
        container: whether the job runs in a container.
        changed: the user's value of each changed setting, which replaces the table's value; None removes the setting.

    Raises:
        UpcycleError: `changed` has a name that is not in the table.
    """
    changed = changed or {}
    for name in changed:
        if name not in names():
            raise UpcycleError.unknown("run.executor.performance", name, names())
    if not job.is_training:
        return {}
    facts = _facts(job, card, container=container)
    found: dict[str, str] = {}
    for row in table()[ENVIRONMENT] + (table()[scheduler] if scheduler else []):
        name = row["name"]
        if name in changed:
            if changed[name] is not None:
                found[name] = str(changed[name])
        elif name not in found and _holds(row, facts):
            found[name] = row["value"]
    return found


def _facts(job: Job, card: str, *, container: bool) -> dict[str, Any]:
    """Gather the known facts to which the table's conditions refer, by name."""
    facts: dict[str, Any] = {"card": card, "container": container, "gpus_per_node": job.ranks_per_node}
    if profile := job.profile:
        facts |= asdict(profile)
        facts["split"] = profile.tp > 1 or profile.cp > 1
        facts["pipelined"], facts["experts_split"] = profile.pp > 1, profile.ep > 1
    return facts


def _holds(row: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
    def is_true(name: str, wanted: Any) -> bool:
        return facts[name] in (wanted if isinstance(wanted, list) else [wanted])

    when, unless = row.get("when", {}), row.get("unless", {})
    return (
        facts.keys() >= when.keys() | unless.keys()
        and all(is_true(*condition) for condition in when.items())
        and not any(is_true(*condition) for condition in unless.items())
    )


def variables(found: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that are environment variables."""
    return {name: value for name, value in found.items() if name[:1].isupper()}


def srun_options(found: Mapping[str, str]) -> list[str]:
    """Return the settings that are srun options."""
    options = {name: value for name, value in found.items() if name.startswith("--") and name != SEGMENT}
    return [f"{name}={value}" if value else name for name, value in options.items()]


def segment(found: Mapping[str, str], nodes: int) -> int | None:
    """Return the number of nodes per rack for Slurm (the largest divisor within the limit), or None without a limit.

    Example:
        >>> segment({"--segment": "18"}, 64)
        16
    """
    most = int(found.get(SEGMENT, 0))
    return next((size for size in range(min(nodes, most), 0, -1) if nodes % size == 0), None)


def bound(found: Mapping[str, str]) -> list[str]:
    """Return the words before a rank's command that bind the rank to its GPU's memory node, if numactl can."""
    per_node = found.get(NUMACTL)
    return ["bash", "-c", _BIND % (per_node, per_node), "bash"] if per_node else []


def performance_settings_here(job: Job) -> dict[str, str]:
    """Return a training's performance variables that this environment does not set yet; none without a GPU."""
    if not torch.cuda.is_available() or getattr(job.profile, "accelerator", "auto") == "cpu":
        return {}
    words = re.split(r"[^a-z0-9]+", torch.cuda.get_device_name(0).lower())
    found = performance_settings(job, next((card for card in table()["cards"] if card in words), ""))
    return {name: value for name, value in found.items() if name not in os.environ}


def option_name(word: str) -> str:
    """Return the option that an srun word sets, or that a word such as `--no-container-mount-home` resets.

    Example:
        >>> option_name("--mpi=none"), option_name("--container-mount-home")
        ('--mpi', '--container-mount-home')
    """
    return word.partition("=")[0].replace("--no-", "--", 1)
