"""What Slurm's commands say: which cluster this is, how a job ended, why one was refused."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from nemo_upcycle.pipeline.executors.base import UnreachableError


#: In what a command says when the controller did not answer it.
NO_ANSWER = ("Unable to contact", "timed out")
#: Variables of Slurm's that say which controller to ask; all others describe an allocation.
OF_CONTROLLER = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")


def cluster_name() -> str:
    """Return the name of the cluster whose controller answers here; empty without Slurm's commands.

    Raises:
        UnreachableError: the controller does not answer.
    """
    if shutil.which("scontrol") is None:
        return ""
    asked = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, check=False)
    found = re.search(r"^ClusterName\s*=\s*(\S+)", asked.stdout, re.MULTILINE)
    if not found:
        raise UnreachableError(f"Slurm does not say which cluster this is: {last_line(asked.stderr)}")
    return found[1]


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


def refusal_hint(text: str) -> str:
    """Return a sentence on what to change, where it is no single setting that `sbatch` names.

    Example:
        >>> refusal_hint("Invalid account or account/partition combination specified")
        ' `sacctmgr show associations user=$USER` lists what run.executor.account may be, and its partitions.'
    """
    if "Invalid account" in text:
        return " `sacctmgr show associations user=$USER` lists what run.executor.account may be, and its partitions."
    if "policy" in text or "SubmitJob" in text:
        limits = "`sacctmgr show qos` and `sacctmgr show associations user=$USER` have the limits"
        return (
            f" {limits}. Fix: if it is that of the jobs in the queue, submit fewer stages at once with --until STAGE."
        )
    return ""


def ending(identity: str) -> str:
    """Return how a job ended; the controller knows for some minutes, the accounting, where there is one, for good."""
    asked = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", identity], capture_output=True, text=True, check=False
    )
    found = dict(word.partition("=")[::2] for word in asked.stdout.split())
    if not found.get("JobState"):
        command = [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=State,ExitCode",
            f"--jobs={identity}",
        ]
        try:
            asked = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return ""
        state, _, code = asked.stdout.strip().partition("|")
        found = {"JobState": state, "ExitCode": code}
    text = [found.get("JobState", ""), found.get("Reason", "None"), f"exit status {found.get('ExitCode', '')}"]
    return ", ".join(word for word in text if word not in ("", "None", "exit status "))
