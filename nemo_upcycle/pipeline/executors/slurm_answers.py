"""Read the answers of Slurm's commands: whether it accepts a job, why a job waits, how a job ended, and what to do."""

from __future__ import annotations

import os
import re
import subprocess
from typing import Any

from nemo_upcycle.pipeline.executors.jobs import JobState, Phase


#: Words in the output of a command if the controller did not answer.
NO_ANSWER = ("Unable to contact", "timed out")
#: Slurm's variables that name the controller. All its other variables describe an allocation.
OF_CONTROLLER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")
#: Slurm's reason for a job that never starts, because Slurm regards an earlier job as failed.
ORPHANED = "DependencyNeverSatisfied"
#: Advice for Slurm's reasons, by a pattern for a reason's whole text. The first match is used. Reasons that pass when
#: other jobs end, such as Priority, Resources and the limits of a group, are omitted.
_PERSONS_END_IT = {
    "JobHeldUser": "let it go with `scontrol release {job}`",
    "JobHeldAdmin": "an administrator holds it: ask them for `scontrol release {job}`",
    "JobHoldMaxRequeue|JobLaunchFailure|.*launch failed.*|.*requeued held.*": (
        "`scontrol show job {job}` and the job's folder say why it could not start; then `scontrol release {job}`"
    ),
    "PartitionDown|PartitionInactive|PartitionConfig": (
        "wait until the administrators open it, or stop watching, `scancel {job}` and set another `partition`"
    ),
    "ReqNodeNotAvail.*|Nodes required for job are DOWN.*": (
        "`sinfo -R` and `scontrol show reservation` say which nodes are down, drained or reserved, and until when"
    ),
    "(Assoc|QOS)Max(Jobs|SubmitJob|.*PerUser).*|Max.*Per(Account|User)": (
        "it starts when other jobs of yours, or of the account, have ended"
    ),
}
#: Advice for a job that asks for something that it cannot get, by the reason.
_NEVER_STARTS = {
    "PartitionTimeLimit|.*MaxWallDuration.*|(Association|QOS)TimeLimit": (
        "lower `time`: `sinfo --format='%P %l'` and `sacctmgr show qos` have the limits; or set another `partition`"
    ),
    "PartitionNodeLimit": "ask for fewer nodes (`sinfo --format='%P %D'`), or set another `partition`",
    "(Assoc|QOS)Max.*Per(Job|Node)(Limit)?|(Association|QOS)ResourceLimit|MaxMemPerLimit": (
        "ask for less in one job, or set another `qos`: `sacctmgr show qos` and `... associations` have the limits"
    ),
    "QOSMin.*": "ask for more, or set another `qos`: `sacctmgr show qos` has the limits",
    "BadConstraints": "no node has what it asks for: change `constraint`, `gres`, `mem` or `cpus_per_task`",
    "AccountNotAllowed|InvalidAccount|QOSNotAllowed|InvalidQOS": (
        "set another `account` or `qos`: `sacctmgr show associations user=$USER` lists yours"
    ),
    "ReservationDeleted|ReservationInvalid": "name another reservation, or none",
    "DeadLine": "ask for a later deadline, or a shorter `time`",
}
#: States of a job that has not started.
WAITING_STATES = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")


def ask(*command: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of Slurm and return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def last_line(text: str) -> str:
    """Return the line of an error that gives the reason."""
    lines = text.strip().splitlines() or ["no reason given"]
    return lines[-1].removeprefix("sbatch: error: ").removeprefix("allocation failure: ")


def environment() -> dict[str, str]:
    """Return this process's variables without the variables of a Slurm allocation around it."""
    is_inside = "SLURM_JOB_ID" in os.environ
    return {
        name: value
        for name, value in os.environ.items()
        if not is_inside or not name.startswith("SLURM_") or name in OF_CONTROLLER
    }


def job_id(text: str) -> str | None:
    """Find the id of a submitted job in the output of `sbatch --parsable`, which may also hold a site's own words.

    Example:
        >>> job_id("4711;alps")  # on federated clusters the cluster's name follows
        '4711'
    """
    found = re.findall(r"^(\d+)(?:;.*)?$", text.strip(), re.MULTILINE)
    return found[-1] if found else None


def refusal_hint(text: str) -> str:
    """Return a sentence on what to change if `sbatch` names no single setting; empty if nothing is known.

    Example:
        >>> refusal_hint("Invalid account or account/partition combination specified")
        ' `sacctmgr show associations user=$USER` lists the values for run.executor.account and their partitions.'
    """
    if "Invalid account" in text:
        return (
            " `sacctmgr show associations user=$USER` lists the values for run.executor.account and their partitions."
        )
    if "policy" in text or "SubmitJob" in text:
        limits = " `sacctmgr show qos` and `sacctmgr show associations user=$USER` have the limits."
        return f"{limits} If too many jobs are in the queue, submit fewer stages at once with --until STAGE."
    return ""


def ending(identity: str) -> str:
    """Return how a job ended.

    The controller remembers a job's end for some minutes. The accounting, if the cluster has one, always remembers it.
    """
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


def waiting(job: str, reason: str, partition: str = "") -> JobState:
    """Return the state of a waiting job, with advice if the reason is in one of the two tables.

    Args:
        job: id of the job.
        reason: Slurm's reason.
        partition: partition in which the job waits; if there are several partitions, the reason may apply to only one.

    Example:
        >>> waiting("7", "JobHeldUser").reason
        'JobHeldUser: let it go with `scontrol release 7`'
    """
    if reason == ORPHANED:
        return JobState(Phase.ENDED, reason, is_abandoned=True, is_orphaned=True)
    for fixes, is_abandoned in ((_PERSONS_END_IT, False), (_NEVER_STARTS, "," not in partition)):
        for pattern, fix in fixes.items():
            if re.fullmatch(pattern, reason):
                phase = Phase.ENDED if is_abandoned else Phase.WAITING
                return JobState(phase, f"{reason}: {fix.format(job=job)}", is_abandoned=is_abandoned)
    return JobState(Phase.WAITING, reason.replace("None", ""))
