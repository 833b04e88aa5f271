"""Run one stage in its own process, or on every rank if the stage is parallel: checks, work, marker."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from nemo_upcycle.errors import StageError, StageStopped, UpcycleError
from nemo_upcycle.pipeline.markers import ENDED, FAILED, STOPPED, StageFolder
from nemo_upcycle.pipeline.notify import DONE, NOTIFIED, notify, notify_of_end
from nemo_upcycle.pipeline.order import before, read_plan, require_same_work, unfinished
from nemo_upcycle.pipeline.plan import Stage, WorkPlan
from nemo_upcycle.trainers.lineage import read_branches
from nemo_upcycle.utils.console import is_verbose, quiet_libraries
from nemo_upcycle.utils.files import in_use
from nemo_upcycle.utils.progress import duration, show_messages
from nemo_upcycle.utils.ranks import is_first_rank
from nemo_upcycle.utils.sieve import sifted


logger = logging.getLogger(__name__)
DONE_BEFORE = "done earlier, from the same inputs"
#: Seconds that the other ranks wait before they end, so that the first rank can report the reason first.
_FIRST_SPEAKS_S = 1.0


def run_stage(name: str, dir: str) -> None:
    """Run a stage of a run, unless it is done already.

    Every job of the pipeline calls this function. A user's mistake ends the process with one message and status 2.

    Args:
        name: name of the stage.
        dir: the run's folder, with its plan.
    """
    show_messages()
    run_dir, quiet = Path(dir), not is_verbose()
    if quiet:
        quiet_libraries()
    try:
        with sifted(libraries_log(run_dir, name)) if quiet and is_first_rank() else nullcontext():
            plan = read_plan(run_dir)
            _run(plan.stage(name), run_dir, plan)
    except UpcycleError as error:  # the stage did not start; another job may use its folder, so record nothing
        sys.stderr.write(f"[{name}] {error}\n")
        raise SystemExit(error.exit_status) from None


def libraries_log(run_dir: Path, stage: str) -> Path:
    """Return the file for the messages of libraries that a stage keeps off the console."""
    return run_dir / "logs" / f"{stage}-libraries.log"


@contextmanager
def _recorded(folder: StageFolder, command: str) -> Iterator[None]:
    """Record and print the error that ended a stage's work (once for all ranks with this error), and exit.

    Args:
        folder: folder of the stage.
        command: command of the user to run, as in `WorkPlan.notify`.
    """
    try:
        yield
    except (StageStopped, UpcycleError) as error:
        if not is_first_rank():
            time.sleep(_FIRST_SPEAKS_S)
        if is_first_rank() or not (folder.path / ENDED).is_file():
            sys.stderr.write(f"[{folder.name}] {error}\n")
            how = STOPPED if isinstance(error, StageStopped) else FAILED
            with suppress(OSError):  # the disk may be full, which may be the error itself
                folder.ended(how)
            notify_of_end(command, how, folder.path, str(error))
        raise SystemExit(error.exit_status) from None
    except Exception as error:
        notify_of_end(command, FAILED, folder.path, f"{type(error).__name__}: {error}")
        raise


def _run(stage: Stage, run_dir: Path, plan: WorkPlan) -> None:
    # Abort if an earlier stage failed, because some executors start the next stage even then.
    if (broken := unfinished(before(plan, stage.name), run_dir, plan)) is not None:
        raise StageError(f"Stage did not start: stage '{broken}' has not finished in {run_dir}.")
    folder, inputs = stage.folder(run_dir, plan), stage.inputs(run_dir, plan)
    first = is_first_rank()
    if folder.is_done(inputs):
        if first:
            logger.info("[%s] %s", stage.name, DONE_BEFORE)
        return
    if not first:
        with _recorded(folder, plan.notify):
            stage.work(run_dir, plan)
        return
    with in_use(folder.path), _recorded(folder, plan.notify):
        if stage.resumable:
            require_same_work(run_dir, plan)
        for change in folder.start(inputs, stage.free_of(plan), resumable=stage.resumable):
            logger.info("[%s] continues with a changed setting: %s", stage.name, change)
        (folder.path / NOTIFIED).unlink(missing_ok=True)
        if (branch := read_branches(folder.path)[-1]).number > 1:
            logger.info("[%s] %s", stage.name, branch.describe())
        logger.info("[%s] %s", stage.name, (stage.work.__doc__ or "").split("\n")[0])
        start_s = time.monotonic()
        outputs = stage.work(run_dir, plan)
        seconds = time.monotonic() - start_s
        folder.finish(inputs, seconds, outputs, stage.content_of(run_dir, plan, outputs))
        logger.info("[%s] done in %s", stage.name, duration(seconds))
        if stage.name == plan.last:
            notify(plan.notify, DONE, folder.path, f"The run is done in {run_dir}.")
