"""Why a job of Slurm waits, where that does not pass by itself, and what to do about it."""

from __future__ import annotations

import re

from nemo_upcycle.pipeline.executors.base import JobState, Phase


#: Why a job will never start that waits for one which Slurm holds to have failed.
ORPHANED = "DependencyNeverSatisfied"
#: Reasons, as patterns of the whole of Slurm's text, and what to do; the first that fits. What passes when other jobs
#: end, as Priority, Resources and the limits of a group, is not here.
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
#: The same of a job that asks for what it cannot get.
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


def waiting(job: str, reason: str, partition: str = "") -> JobState:
    """Return the state of a job that waits, with what to do where the reason does not pass by itself.

    Args:
        job: its id.
        reason: Slurm's.
        partition: which it waits in; of several, the reason may be that of one alone.

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
