"""Write the batch script around a stage, which requeues a stage that makes progress, and refuse unsuitable paths."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from nemo_run.config import RUNDIR_NAME

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.pipeline.executors.jobs import Job
from nemo_upcycle.pipeline.markers import ENDED, FAILED
from nemo_upcycle.utils.files import MARKER


#: Paths that NeMo-Run may write into its script without quotes, and the folder whose name NeMo-Run replaces in the
#: script.
_PLAIN_PATH, _REPLACED = re.compile(r"[\w./+=@%~-]+"), f"/{RUNDIR_NAME}"
#: Progress of a training: the step of its newest checkpoint, written by Megatron-Bridge or by NeMo.
_STEP = r"""{ awk 1 "$stage"/checkpoints/latest_checkpointed_iteration.txt 2>/dev/null
        for saved in "$stage"/checkpoints/*step=*/weights/.metadata; do
            [ -e "${saved%/weights/.metadata}-unfinished" ] || echo "$saved"
        done | grep -v '[*]' | sed 's/.*step=\([0-9]*\).*/\1/'
    } | sort -n | tail -n 1"""
#: Progress of the data stage: datatrove leaves a file for each finished task.
_TASKS = "find \"$stage\" -path '*/completions/*' -type f 2>/dev/null | wc -l"
#: Line that replaces NeMo-Run's `set -evx`, which prints every line of the script and hides why the script failed. The
#: line unsets a variable through which Slurm would pass SBATCH_EXPORT=NONE on to every srun. With that setting, no
#: rank would even have a PATH.
PROLOGUE = "unset SLURM_EXPORT_ENV"
#: The batch shell outlives the ranks, because the ranks are told to stop before the time limit. The shell then decides
#: by the stage's marker whether the job has succeeded. Exit codes cannot decide: srun reports only one of several
#: ranks, and a rank may crash after its work is done.
_DECIDE = r"""
stage={folder}
rm -f "$stage/{ended}"  # of an earlier start
touch {job}/started
{before}finish() {{
    status=$?
    set +e
    trap - EXIT
    done_before() {{ [ $status -eq 0 ] && [ -e "$stage/{marker}" ] && [ ! -e "$stage/{ended}" ]; }}
    done_now() {{ [ -e "$stage/{marker}" ] && [ ! {job}/started -nt "$stage/{marker}" ]; }}
    if done_now || done_before; then
        rm -f {in_vain}
        exit 0
    fi
    if [ "$(cat "$stage/{ended}" 2>/dev/null)" = {failed} ]; then
        exit 2
    fi
{again}    exit 1
}}
trap finish EXIT
trap : TERM
"""
#: Lines of the script before a resumable stage starts, and lines after the stage has ended without a marker. A
#: cancelled job is no longer RUNNING. If a partition requeues preempted jobs, Slurm requeues the job itself, so the
#: script must not requeue the job.
_BEFORE = r"""progress() {{
    {progress}
}}
persist() {{  # the controller may be busy, or fail over
    for _ in $(seq 20); do "$@" && return; sleep 15; done
    return 1
}}
at_start=$(progress)
"""
_AGAIN = r"""    shown=$(persist scontrol --oneliner show job "$SLURM_JOB_ID")
    case "$shown" in
    *JobState=RUNNING*PreemptTime=2*)
        scontrol --oneliner show partition "$SLURM_JOB_PARTITION" | grep -q PreemptMode=REQUEUE && exit 1 ;;
    *JobState=RUNNING*) ;;
    *) exit 1 ;;
    esac
    kept=$(progress)
    slow=
{alarm}    if [ "${{kept:--1}}" -gt "${{at_start:--1}}" ] && [ -z "$slow" ]; then
        rm -f {in_vain}
    elif [ -e {in_vain} ]; then
        echo "[{name}] stopped twice with little or no progress ({unit} ${{kept:-none}}): not requeued"
        exit 1
    else
        touch {in_vain}
    fi
    echo "[{name}] stopped; kept {unit} ${{kept:-none}}; to be requeued and resumed from there"
    persist scontrol requeue "$SLURM_JOB_ID" && sleep 60
"""
#: Lines for a training. The training's ranks write a file when their setup is done. A job that spends most of its time
#: on setup makes only a step or two of progress, and would be requeued without end. The script reports such a job as a
#: job without progress. One such job is allowed, since a file system may have been slow. `limit` excludes the time
#: after the signal.
_ALARM = r"""    limit=$(sed -n 's/.*TimeLimit=\([0-9:-]*\).*/\1/p' <<<"$shown" | tr - : |
        awk -F: '{{ for (i = 1; i <= NF; i++) s = s * (NF == 4 && i == 2 ? 24 : 60) + $i; print s - {signal_s} }}')
    ready=$(date +%s)
    [ ! "$stage/training.json" -nt {job}/started ] || ready=$(stat -c %Y "$stage/training.json")
    setup=$((ready - $(stat -c %Y {job}/started)))
    if [ "${{limit:-0}}" -gt 0 ] && [ $((2 * setup)) -ge "$limit" ]; then
        echo "[{name}] start-up took $setup s of $limit s; raise run.executor.stages.{name}.time"
        [ $((4 * setup)) -lt $((3 * limit)) ] || slow=yes
    fi
"""

#: Script that submits jobs by hand, as `SlurmScheduler.submit` does.
SUBMIT = """
#!/bin/bash
# Submits the jobs of this folder; each waits for those that it needs.
set -euo pipefail
if [ -n "${{SLURM_JOB_ID:-}}" ]; then  # a new job is no part of the allocation that this runs in
    for name in "${{!SLURM_@}}"; do
        case $name in {kept}) ;; *) unset "$name" ;; esac
    done
fi
cd "$(dirname "$0")"
mkdir -p {folders}
submit() {{
    sbatch --requeue --parsable "$@" | sed -nE 's/^([0-9]+)(;.*)?$/\\1/p' | tail -n 1 | grep .
}}
"""


def in_vain(job: Job) -> Path:
    """Return the file that marks a job whose last start made no progress. A second such start ends the job."""
    return job.folder / "in_vain"


def setup_lines(job: Job, signal_s: int = 0) -> list[str]:
    """Return the lines of the batch script before a stage. These lines also decide what happens after its end.

    Args:
        job: job of the stage; a resumable stage is requeued as long as it makes progress.
        signal_s: seconds before the end of the job's time at which the stage is told to stop.

    Example:
        >>> from pathlib import Path
        >>> setup_lines(Job("import", Path("/shared/run"), ("true",)))[0]
        'mkdir -p /shared/run/jobs/import/code'
    """
    names = {
        "progress": _STEP if job.is_training else _TASKS,
        "unit": "step" if job.is_training else "tasks:",
        "folder": shlex.quote(str(job.run_dir / job.name)),
        "job": shlex.quote(str(job.folder)),
        "in_vain": shlex.quote(str(in_vain(job))),
        "name": job.name,
        "marker": MARKER,
        "ended": ENDED,
        "failed": FAILED,
        "signal_s": signal_s,
    }
    names["alarm"] = _ALARM.format(**names) if job.is_training else ""
    before, again = (text.format(**names) if job.is_resumable else "" for text in (_BEFORE, _AGAIN))
    code = shlex.quote(str(job.folder / "code"))  # the folder where NeMo-Run starts the ranks
    return [f"mkdir -p {code}", _DECIDE.format(**names, before=before, again=again).strip()]


def escaped(value: str) -> str:
    """Escape a value for double quotes in bash. Variables in the value are still expanded."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`")


def require_plain(path: Path, *, in_container: bool) -> None:
    """Check that NeMo-Run's batch script can contain a path."""
    fix = "rename the folder, or make a link to it with a plain name"
    if not _PLAIN_PATH.fullmatch(str(path)):
        got = "a character that NeMo-Run's batch script does not quote"
        raise UpcycleError(
            f"Path '{path}'", kind="refused", got=f"has {got}", fix=f"{fix} (letters, digits and . _ / + = @ % ~ -)"
        )
    if _REPLACED in str(path) and not in_container:
        got = f"'{_REPLACED}' in it, which NeMo-Run replaces in batch scripts"
        raise UpcycleError(f"Path '{path}'", kind="refused", got=f"has {got}", fix=fix)


def missing_mounts(job: Job, mounts: Sequence[str]) -> list[str]:
    """Return mounts for the stage's files that no user's mount covers. Files keep their paths in the container."""
    missing: list[str] = []
    for path in (job.run_dir, *job.reads):
        if not any(_holds(mount, path) for mount in [*mounts, *missing]):
            missing.append(f"{path}:{path}")
    return missing


def _holds(mount: str, path: Path) -> bool:
    """Return whether a mount, `HOST:CONTAINER`, shows a host path under the same path in the container."""
    host, _, rest = mount.partition(":")
    inside = Path(rest.partition(":")[0] or host)
    return path.is_relative_to(inside) and (Path(host) / path.relative_to(inside)).resolve() == path.resolve()
