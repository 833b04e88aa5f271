"""The engine's command: `python -m nemo_upcycle.data.engine DIR/build/plan.json --workers N`, in the data environment.

    --slurm PARTITION [--time T]   run the tasks as Slurm jobs, N at a time; start the engine on a login node
    --ray                          run the tasks on a running Ray cluster

A rerun resumes where the engine was stopped or killed. The output is the same, byte for byte.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from subprocess import CalledProcessError
from typing import Any

from nemo_upcycle.data.engine.processes import stop_with_parent
from nemo_upcycle.data.engine.tasks import load_plan
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.package_info import __version__
from nemo_upcycle.utils.checkout import require_one_checkout


_PACKAGES = ("datatrove", "fastokens", "tokenizers", "pyarrow", "numpy")
_BAD_INPUT = 2
_STOPPED = "\nstopped; what is finished is kept\n"


def main(argv: list[str] | None = None) -> int:
    """Run the engine and return the exit status: 0, 2 (bad input or a failure), or 128 plus the signal's number."""
    stop_with_parent()
    try:
        require_one_checkout()
        arguments = _parse(argv)
        from nemo_upcycle.data.engine.pipelines import RunOn
        from nemo_upcycle.data.engine.supervise import Stopped, run_plan

        run_on = RunOn(
            workers=arguments.workers,
            slurm=arguments.slurm,
            time_limit=arguments.time,
            ray=arguments.ray,
            sbatch=dict(word.split("=", 1) for word in arguments.sbatch),
            srun=tuple(arguments.srun),
            task_python=arguments.task_python,
        )
        _check(run_on)
        try:
            run_plan(load_plan(arguments.plan.resolve()), run_on)
        except Stopped as stopped:
            sys.stderr.write(_STOPPED)
            return 128 + int(stopped.args[0])
        return 0
    except UpcycleError as error:
        sys.stderr.write(f"error: {error}\n")
    except ModuleNotFoundError as error:
        sys.stderr.write(
            f"error: {error.name} is not installed. Run `nemo-upcycle doctor`, which prints how to add it.\n"
        )
    except CalledProcessError as error:  # Slurm's own message is shown already
        sys.stderr.write(
            f"error: {error.cmd[0]}: it failed with status {error.returncode}."
            f" Check --slurm {arguments.slurm}, and --time; `sinfo` lists the partitions.\n"
        )
    except OSError as error:
        sys.stderr.write(
            f"error: {error.filename or 'The file system'} cannot be used: {error.strerror or error}."
            " Check who may write there, and the room on the disk.\n"
        )
    except KeyboardInterrupt:
        sys.stderr.write(_STOPPED)
        return 128 + signal.SIGINT
    return _BAD_INPUT


def _parse(argv: list[str] | None) -> argparse.Namespace:
    usage, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m nemo_upcycle.data.engine",
        description=usage,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    versions = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    parser.add_argument("--version", action="version", version=f"nemo-upcycle {__version__}, {versions}")
    parser.add_argument("plan", type=Path, help="DIR/build/plan.json")
    parser.add_argument("--workers", type=int, default=_cores(), help="tasks at a time (default: all usable cores)")
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--slurm", metavar="PARTITION", help="run the tasks as jobs of Slurm")
    runs.add_argument("--ray", action="store_true", help="run the tasks on a Ray cluster")
    parser.add_argument("--time", default="24:00:00", help="time limit of a Slurm job (24:00:00)")
    parser.add_argument("--sbatch", metavar="NAME=VALUE", action="append", default=[], help="another option of sbatch")
    parser.add_argument("--srun", metavar="WORD", action="append", default=[], help="another option of srun")
    parser.add_argument("--task-python", metavar="PATH", help="Python of the tasks' environment (default: this one)")
    return parser.parse_args(argv)


def _cores() -> int:
    """Return how many cores this process may use; a Slurm job may use only some cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return version(name)
    except ModuleNotFoundError:
        return "missing"


def _check(run_on: Any) -> None:
    if run_on.slurm and "SLURM_ARRAY_TASK_ID" in os.environ:
        raise UpcycleError(
            "--slurm",
            kind="refused",
            got="cannot be used inside a job of Slurm",
            fix="start it on a login node, or use --workers",
        )
    if run_on.slurm and not which("sbatch"):
        raise UpcycleError(
            "--slurm",
            kind="missing",
            got="needs sbatch, which this machine does not have",
            fix="start it on a login node, or use --workers",
        )
    if run_on.ray and not find_spec("ray"):
        raise UpcycleError(
            "--ray", kind="missing", got="needs the package ray", fix=f"run: {sys.executable} -m pip install ray"
        )


if __name__ == "__main__":
    sys.exit(main())
