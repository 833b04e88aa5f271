"""Run the stages in a child process, show their progress, and end everything at once on a signal."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import Any, NoReturn

from nemo_upcycle.data.engine.pipelines import RunOn, completed, executor, slurm_jobs, stages, tasks_of_stages
from nemo_upcycle.data.engine.processes import die_with_parent
from nemo_upcycle.data.engine.tasks import BEGUN, EnginePlan, clear_asides
from nemo_upcycle.data.engine.tokenise import choose_library
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import read_json, write_json
from nemo_upcycle.utils.locks import take_lock
from nemo_upcycle.utils.progress import ProgressLine


_KILLED = "A worker was killed, perhaps for lack of memory. Use fewer --workers, then run the command again."
_LOCK = ".engine.lock"
_UNKNOWN_JOB = "Invalid job id"  # Slurm's answer for a job that ended a while ago
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # each signal stops the engine, unless nohup ignores it
_POLL_S, _SLURM_POLL_S = 0.2, 5.0
_PATIENCE_S = 10.0  # time for the workers of a killed engine to end, and for a shared disk to show new files


class Stopped(Exception):
    """The engine was stopped by a signal; the argument is the signal's number."""


def run_plan(plan: EnginePlan, run_on: RunOn) -> None:
    """Run the incomplete tasks of a plan.

    Args:
        plan: plan of the engine.
        run_on: place where the tasks run.

    Raises:
        UpcycleError: another engine works in the folder, the folder holds work of another plan, or a task failed.
        Stopped: a signal asked the engine to stop.
    """
    die_with_parent()
    try:  # the workers of a killed engine hold the lock until they have ended
        lock = take_lock(plan.folder / _LOCK, timeout_s=_PATIENCE_S)
    except TimeoutError:
        raise UpcycleError(
            str(plan.folder), kind="state", got="is in use by another data engine", fix="wait for it, or stop it"
        ) from None
    with lock:
        _require_same_plan(plan)
        _cancel_jobs(plan)
        _require_no_jobs(plan)
        clear_asides(plan)
        _run(plan, run_on)
        clear_asides(plan)


def _require_same_plan(plan: EnginePlan) -> None:
    path, now = plan.folder / BEGUN, plan.fingerprint()
    if not path.is_file():
        write_json(path, now)
    elif (before := read_json(path)) != now:
        changed = [key for key in now["plan"] if now["plan"].get(key) != before["plan"].get(key)]
        raise UpcycleError(
            str(plan.folder),
            kind="state",
            got=(
                f"holds work of another plan ({', '.join(changed) or 'the tokenizer, the n-grams or the version'} "
                "changed)"
            ),
            fix="use the files and settings of that plan, choose another folder, or delete this one",
        )


def _run(plan: EnginePlan, run_on: RunOn) -> None:
    done = completed(plan)
    todo = sum(tasks_of_stages(plan).values()) - done
    (plan.folder / "logs").mkdir(exist_ok=True)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child: Any = multiprocessing.get_context("fork").Process(target=_child, args=(plan, run_on, sender))
    old = {
        number: signal.signal(number, _stop) for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        child.start()
        sender.close()
        with ProgressLine("data", total=todo) as line:
            while child.is_alive():
                child.join(_POLL_S)
                if new := completed(plan) - done:
                    done += new
                    line.advance(new)
        error = _listen(receiver)
    finally:
        if child.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.join()
        _cancel_jobs(plan)
        for number, handler in old.items():
            signal.signal(number, handler)
    if error or child.exitcode:
        raise UpcycleError(error or _KILLED)


def _listen(receiver: Any) -> str:
    """Show the child's messages, and return its error."""
    error = ""
    with contextlib.suppress(EOFError):
        while True:
            is_error, text = receiver.recv()
            if is_error:
                error = text
            else:
                sys.stderr.write(text + "\n")
    return error


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise Stopped(number)


def _cancel_jobs(plan: EnginePlan) -> None:
    """Cancel the jobs of this engine, or of an engine that was killed.

    If Slurm does not answer, the job numbers are kept and the next run tries again.
    """
    jobs = slurm_jobs(plan)
    if jobs.is_file() and _ask_slurm("scancel", *read_json(jobs)) is not None:
        jobs.unlink(missing_ok=True)


def _require_no_jobs(plan: EnginePlan) -> None:
    if (jobs := slurm_jobs(plan)).is_file():
        raise UpcycleError(
            "Slurm",
            kind="state",
            got=f"did not cancel the jobs of an earlier run: {', '.join(read_json(jobs))}",
            fix=f"run the command again on a login node when Slurm answers; if the jobs are gone, delete {jobs}",
        )


def _ask_slurm(*command: str) -> str | None:
    """Return Slurm's answer, which is empty if the jobs are gone; return None if Slurm does not answer."""
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 or _UNKNOWN_JOB in done.stderr else None


def _child(plan: EnginePlan, run_on: RunOn, sender: Any) -> NoReturn:
    """Run the stages one after the other, with datatrove's output in a file."""
    os.setsid()  # Ctrl-C goes only to the parent
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    log = (plan.folder / "logs" / "engine.log").open("a", encoding="utf-8")
    for stream in (1, 2):
        os.dup2(log.fileno(), stream)
    status = 0
    try:
        library, reason = _library(plan)
        if reason:
            sender.send((False, f"{reason}; {library} is used instead, which is slower and gives the same ids"))
        _run_stages(plan, run_on, library)
    except BaseException as error:
        status = 1
        sender.send((True, _error_text(error, log.name)))
        with contextlib.suppress(OSError):  # the disk may be full
            traceback.print_exc(file=log)
            log.flush()
    os._exit(status)  # do not wait for other workers: they end with this process


def _library(plan: EnginePlan) -> tuple[str, str]:
    """Choose the library in a separate process, because its threads must not exist when workers are forked."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(choose_library, plan).result()
        except Exception as error:
            got = (str(error) or type(error).__name__).splitlines()[0]
            raise UpcycleError(
                plan.tokenizer, kind="state", got=f"is not a usable tokenizer.json ({got})", fix="copy it again"
            ) from None


def _run_stages(plan: EnginePlan, run_on: RunOn, library: str) -> None:
    if run_on.ray:
        import ray

        ray.init(address="auto", ignore_reinit_error=True, log_to_driver=False)
    for stage in stages(plan, library):
        runs = executor(plan, stage, run_on)
        runs.run()
        if run_on.slurm:
            _wait_for_slurm(plan, runs)
        if missing := runs.get_incomplete_ranks(skip_completed=True):
            raise UpcycleError(
                f"{len(missing)} of {stage.tasks} tasks of {stage.name}",
                kind="state",
                got=f"did not finish, the first one is {missing[0]}",
                fix=f"read the logs in {plan.folder / 'logs' / stage.name}, then run the command again",
            )


def _wait_for_slurm(plan: EnginePlan, runs: Any) -> None:
    """Wait until a stage is complete or its jobs have left the queue; keep waiting if Slurm does not answer."""
    patience = most = int(_PATIENCE_S / _SLURM_POLL_S)
    while runs.get_incomplete_ranks(skip_completed=True):
        if not patience:
            return
        time.sleep(_SLURM_POLL_S)
        queue = _ask_slurm("squeue", "-h", "-j", ",".join(runs.jobs))
        if queue is not None:
            patience = most if queue else patience - 1
    slurm_jobs(plan).unlink(missing_ok=True)


def _error_text(error: BaseException, log: str) -> str:
    if isinstance(error, UpcycleError):
        return str(error)
    if isinstance(error, BrokenProcessPool):
        return _KILLED
    if isinstance(error, OSError) and error.errno:
        file = str(error.filename or "The file system")
        fix = f"correct that and run the command again; {log} has the details"
        return str(UpcycleError(file, kind="state", got=f"cannot be used: {error.strerror}", fix=fix))
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"The engine failed: {text[:300]}. Read the details in {log}, then run the command again."
