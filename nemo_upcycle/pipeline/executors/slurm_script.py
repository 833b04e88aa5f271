"""What a batch script does around a stage: see how far a training got, and requeue it while it gets further."""

from __future__ import annotations

import shlex

from nemo_upcycle.pipeline.executors.base import Job
from nemo_upcycle.pipeline.markers import ENDED, FAILED
from nemo_upcycle.utils.files import MARKER


#: The batch shell outlives the ranks, which are told to stop before the time limit, and decides. Exit codes cannot
#: tell: of several ranks srun reports one, and a training that saved and stopped ends with 0.
#: A job that was cancelled is not RUNNING any more, and one that Slurm itself requeues never gets here.
_TRAINING = r"""
stage={folder}
newest_step() {{
    ls -d "$stage"/checkpoints/*step=*/weights/.metadata 2>/dev/null |
        sed 's/.*step=\([0-9]*\).*/\1/' | sort -n | tail -n 1
}}
step_at_start=$(newest_step)
touch {job}/started
finish() {{
    status=$?
    set +e
    trap - EXIT
    if [ "$stage/{marker}" -nt {job}/started ]; then
        exit 0
    fi
    if [ $status -eq 0 ] && [ -e "$stage/{marker}" ] && [ ! -e "$stage/{ended}" ]; then  # done before
        exit 0
    fi
    if [ "$(cat "$stage/{ended}" 2>/dev/null)" = {failed} ]; then
        exit 2
    fi
    if [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" != RUNNING ]; then
        exit 1
    fi
    step=$(newest_step)
    if [ "${{step:--1}}" -gt "${{step_at_start:--1}}" ]; then
        echo "[{name}] stopped; kept step $step; requeued, goes on from there"
        scontrol requeue "$SLURM_JOB_ID"
        sleep 60
        exit 1
    fi
    echo "[{name}] stopped, and no checkpoint was finished since this job started: not requeued"
    exit 1
}}
trap finish EXIT
trap : TERM
"""


def setup_lines(job: Job) -> list[str]:
    """Return the lines of the batch script that come before a stage.

    Args:
        job: the stage; of a training, the lines also decide what follows its end.

    Example:
        >>> from pathlib import Path
        >>> setup_lines(Job("import", Path("/shared/run"), ("true",)))
        ['set +vx', 'mkdir -p /shared/run/jobs/import/code']
    """
    lines = ["set +vx", f"mkdir -p {shlex.quote(str(job.folder / 'code'))}"]  # where NeMo-Run lets the ranks start
    if job.is_training:
        text = _TRAINING.format(
            folder=shlex.quote(str(job.run_dir / job.name)),
            job=shlex.quote(str(job.folder)),
            name=job.name,
            marker=MARKER,
            ended=ENDED,
            failed=FAILED,
        )
        lines.append(text.strip())
    return lines
