"""The command that starts a node's ranks under NVIDIA's fault-tolerance launcher, which restarts hung ranks."""

from __future__ import annotations

from collections.abc import Sequence


#: Assumed write speed of a shared file system (GiB/s), if none is given.
USUAL_GIB_S = 2.0
#: Assumed time from a failure of a job to its next step (seconds), if none is given or measured.
USUAL_RESTART_S = 600.0
#: Seconds until a rank's first sign of life: time to read the dense checkpoint, upcycle it, and compile for the first
#: time.
START_S = 1800.0
#: Largest number of seconds between two signs of life. A step takes seconds, but a save before an early end takes
#: minutes (619 GiB at 2 GiB/s take 5 minutes), and gives no sign of life.
SILENCE_S = 600.0
#: Time limit (seconds) for the ranks to save a checkpoint after the launcher was told to stop.
SAVE_S = 1800.0
#: Time limit (seconds) for healthy ranks to end if another rank must be restarted. Healthy ranks cannot save a
#: checkpoint, because they wait for the other rank.
RESTART_S = 15.0
#: Restarts within a job. If a fault returns at the same step, the job ends after this number of restarts.
RESTARTS = 3


def ft_command(
    command: Sequence[str],
    nodes: int,
    ranks_per_node: int,
    *,
    endpoint: str = "$MASTER_ADDR:$MASTER_PORT",
    job: str = "upcycle",
    silence_s: float = SILENCE_S,
    save_s: float = SAVE_S,
    restarts: int = RESTARTS,
) -> tuple[str, ...]:
    """Return a node's command, which runs `command` on the node's ranks and restarts all ranks if one rank fails.

    Start this command once per node, not once per rank. The command sets the variables of torchrun. The launcher
    numbers the nodes by `SLURM_PROCID`, or by `GROUP_RANK` outside Slurm. The recipe needs `hang_detection` among its
    callbacks, since only this callback tells the launcher that a rank is alive. The recipe must also resume from its
    own checkpoints.

    Args:
        command: command of a rank; the command's interpreter must have nvidia-resiliency-ext.
        nodes: number of nodes; no node may drop out, since a layout fits only one number of ranks.
        ranks_per_node: processes per node.
        endpoint: host and port of the first node, where the launchers meet; a shell expands the default.
        job: id that all launchers of one job share, and that no other job has.
        silence_s: largest number of seconds between two signs of life of a rank.
        save_s: time limit (seconds) for a save after SIGTERM to the launcher. The scheduler must not send SIGKILL
            before.
        restarts: number of restarts.

    Example:
        >>> ft_command(("python", "train.py"), 1, 8)[:3]
        ('python', '-m', 'nvidia_resiliency_ext.fault_tolerance.launcher')
    """
    meeting = endpoint if nodes > 1 else "localhost:0"  # a single launcher needs no fixed port
    options = {
        "nnodes": nodes,
        "nproc-per-node": ranks_per_node,
        "rdzv-backend": "c10d",
        "rdzv-endpoint": meeting,
        "rdzv-id": job,
        "max-restarts": restarts,
        "term-timeout": save_s,
        "workers-stop-timeout": RESTART_S,
        "ft-initial-rank-heartbeat-timeout": START_S,
        "ft-rank-heartbeat-timeout": silence_s,
    }
    launcher = (command[0], "-m", "nvidia_resiliency_ext.fault_tolerance.launcher", "--no-python")
    return (*launcher, *(f"--{name}={value}" for name, value in options.items()), *command)
