"""What Slurm's commands answer: whether they take a job, what it waits for, and how it ended."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

from nemo_upcycle.pipeline.executors.jobs import JobState, Phase


#: In what a command says when the controller did not answer it.
NO_ANSWER = ("Unable to contact", "timed out")
#: Variables of Slurm's that say which controller to ask; all others describe an allocation.
OF_CONTROLLER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
#: Why a job will never start that waits for one which Slurm holds to have failed.
ORPHANED = "DependencyNeverSatisfied"
#: Reasons, as a pattern of the whole of Slurm's text, of a job that asks for what it cannot get. What passes when
#: other jobs end, or when a person ends it, is not here.
_NEVER_STARTS = re.compile(
    "PartitionTimeLimit|.*MaxWallDuration.*|(Association|QOS)TimeLimit|PartitionNodeLimit"
    "|(Assoc|QOS)Max.*Per(Job|Node)(Limit)?|(Association|QOS)ResourceLimit|MaxMemPerLimit|QOSMin.*|BadConstraints"
    "|AccountNotAllowed|InvalidAccount|QOSNotAllowed|InvalidQOS|ReservationDeleted|ReservationInvalid|DeadLine"
)
#: Where a person finds what may be asked for.
LIMITS = "`sinfo`, `sacctmgr show qos` and `sacctmgr show associations user=$USER`"
#: States of a job that has not started.
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def ask(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm's, and return what it printed."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def last_line(text: str) -> str:
    """Return the line of an error that has the reason."""
    lines = text.strip().splitlines() or ["no reason given"]
    return lines[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ")


def environment() -> dict[str, str]:
    """Return this process's variables without those of an allocation that it runs in."""
    is_inside = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if not is_inside or not name.startswith("SLURM_") or name in OF_CONTROLLER
    }


def job_id(text: str) -> str | None:
    """Return the id of a submitted job from what `sbatch --parsable` printed; a site's own words may stand around it.

    Example:
        >>> job_id("4711;alps")  # on federated clusters the cluster's name follows
        '4711'
    """
    found = re.findall(r"^(\d+)(?:;.*)?$", text.strip(), re.MULTILINE)
    return found[-1] if found else None


def ending(identity: str) -> str:
    """Return how a job ended; the controller knows for some minutes, the accounting, where there is one, for good."""
    asked = ask("scontrol", "--oneliner", "show", "job", identity)
    found = dict(word.partition("=")[::2] for word in asked.stdout.split())
    if not found.get("JobState"):
        options = ("--noheader", "--parsable2", "--allocations", "--format=State,ExitCode")
        try:
            asked = ask("sacct", *options, f"--jobs={identity}")
        except FileNotFoundError:
            return ""
        state, _, code = asked.stdout.strip().partition("|")
        found = {"JobState": state, "ExitCode": code}
    text = [found.get("JobState", ""), found.get("Reason", "None"), f"exit status {found.get('ExitCode', '')}"]
    return ", ".join(word for word in text if word not in ("", "None", "exit status "))


def waiting(reason: str, partition: str = "") -> JobState:
    """Return the state of a job that waits; one that never starts has ended.

    Args:
        reason: Slurm's.
        partition: which it waits in; of several, the reason may be that of one alone.

    Example:
        >>> waiting("PartitionTimeLimit").is_abandoned, waiting("Priority").is_abandoned
        (True, False)
    """
    if reason == ORPHANED:
        return JobState(Phase.ENDED, reason, is_abandoned=True, is_orphaned=True)
    if _NEVER_STARTS.fullmatch(reason) and "," not in partition:
        return JobState(Phase.ENDED, f"{reason}; limits: {LIMITS}", is_abandoned=True)
    return JobState(Phase.WAITING, reason.replace("None", ""))
