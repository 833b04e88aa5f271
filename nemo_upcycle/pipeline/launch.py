"""`nemo upcycle pipeline`: check the arguments, write the plan, and run the stages one after the other."""

# No postponed annotations here and in the recipes, and Optional[...]: NeMo-Run parses values by them.

import copy
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import nemo_run as run
import torch

from nemo_upcycle.errors import StageError
from nemo_upcycle.pipeline.checks import check_arguments, is_local
from nemo_upcycle.pipeline.console import end_soon
from nemo_upcycle.pipeline.context import PipelineContext
from nemo_upcycle.pipeline.executors import local
from nemo_upcycle.pipeline.plan import RunPlan, Stage
from nemo_upcycle.pipeline.recipes_io import dump_recipe, load_recipe, ranks_of, settings, write_recipes
from nemo_upcycle.pipeline.runner import DONE_BEFORE, run_stage
from nemo_upcycle.pipeline.stages import STAGES, chosen_stages, require_earlier, unfinished
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.utils.files import in_use


COMMAND = "command.txt"
_AGAIN = "Run the same command again: it goes on from there. Folder:"


@run.cli.entrypoint(namespace="upcycle", type="experiment", run_ctx_cls=PipelineContext)
def pipeline(
    ctx: run.cli.RunContext,
    dir: str,
    dense: str,
    pretrain: run.Partial,
    dense_ct: Optional[run.Partial] = None,
    data: str = "sotu",
    evaluation: str = "demo",
    corpus: Optional[str] = None,
    from_stage: Optional[str] = None,
    until_stage: Optional[str] = None,
    only_stage: Optional[str] = None,
) -> None:
    """Turn a dense checkpoint into a trained, exported and evaluated Mixture-of-Experts model.

    Run it again after a stop of any kind, with the same `dir`: finished stages are skipped, training resumes from its
    last checkpoint.

    Args:
        ctx: NeMo-Run's context of the command.
        dir: folder of the run.
        dense: the dense parent: `asset://smollm2-135m`, `hf://ORG/NAME`, or a Hugging Face folder.
        pretrain: recipe of the upcycled model.
        dense_ct: recipe of the dense baseline; None omits it.
        data: what to train on: a blend (a name in conf/data, or a YAML file), or a finished folder of `nemo-upcycle`.
        evaluation: what to evaluate: a name in conf/evaluation, or a YAML file.
        corpus: the former name of `data`.
        from_stage: `--from STAGE`: start with this one; those before it must be finished.
        until_stage: `--until STAGE`: end after this one.
        only_stage: `--only STAGE`: this one alone.

    Raises:
        UpcycleError: an argument or a recipe is not valid, or a stage did not finish.
    """
    run_dir = Path(dir).expanduser().absolute()
    plan = RunPlan(
        pretrain.log.name,
        _whole_path(dense, folder=True),
        _whole_path(corpus or data, folder=True),
        _whole_path(evaluation),
        dump_recipe(pretrain),
        dump_recipe(dense_ct) if dense_ct else None,
    )
    stages = chosen_stages(from_stage, until_stage, only_stage)
    with local.ended_by_ctrl_c():
        check_arguments(run_dir, plan, pretrain, dense_ct, ctx, stages)
        require_earlier(stages, run_dir, plan)
    if ctx.dryrun:
        if is_local(ctx.executor):
            _show_commands(stages, run_dir, plan)
        else:
            _run_as_graph(stages, run_dir, plan, ctx)
        return
    with in_use(run_dir):  # its stages read the plan, so no other run may change it
        plan.write(run_dir)
        (run_dir / COMMAND).write_text(_command() + "\n", encoding="utf-8")
        write_recipes(run_dir, {"pretrain": pretrain, "dense_ct": dense_ct})
        if _chains(ctx.executor):
            _run_as_graph(stages, run_dir, plan, ctx)
        else:
            _run_in_turn(stages, run_dir, plan, ctx.executor)
    if stages[-1] is STAGES[-1] and not ctx.detach:
        _show_result(run_dir)


def _whole_path(name: str, *, folder: bool = False) -> str:
    """Return the absolute path of an argument that names a folder or a YAML file: a job may run in another folder."""
    path = Path(name).expanduser()
    is_path = path.suffix in (".yaml", ".yml") or (folder and path.is_dir())
    return str(path.absolute()) if is_path else name


def _command() -> str:
    """Return the command line as it was typed."""
    program, *words = sys.argv
    typed = [Path(program).name] if os.access(program, os.X_OK) else ["python", program]
    return shlex.join([*typed, *words])


def _chains(executor: Any) -> bool:
    """Return whether the executor's scheduler holds a stage back until the one before it succeeded."""
    return isinstance(executor, run.SlurmExecutor)


def _run_as_graph(stages: Sequence[Stage], run_dir: Path, plan: RunPlan, ctx: run.cli.RunContext) -> None:
    """Hand stages to the scheduler, each held back until the one before it succeeded; or show them."""
    with run.Experiment(f"upcycle-{run_dir.name}") as experiment:
        before: list[str] = []
        for stage in stages:
            before = [_add(experiment, stage, run_dir, plan, ctx.executor, before)]
        if ctx.dryrun:
            experiment.dryrun()
            return
        experiment.run(detach=ctx.detach, tail_logs=True)
    if not ctx.detach and (broken := unfinished(stages, run_dir, plan)) is not None:
        raise StageError(_did_not_finish(broken, run_dir))


def _run_in_turn(stages: Sequence[Stage], run_dir: Path, plan: RunPlan, executor: Any) -> None:
    """Run stage by stage; start nothing else after a stage that did not finish, for whatever reason.

    Raises:
        SystemExit: with 2 after a mistake of the user's, 1 after another failure, 130 or 143 when stopped. The last
            words are the stage's own.
    """
    end_soon()  # however it ends; nothing is imported after this
    script = _script(plan)
    with local.StopSignals() as stop:
        for stage in stages:
            if stage.is_done(run_dir, plan):
                sys.stderr.write(f"[{stage.name}] {DONE_BEFORE}\n")
                continue
            status = _run_one(stage, run_dir, plan, executor, stop, script)
            if stop.signum:
                sys.stderr.write(_stopped(stop.signum, stage, run_dir, plan))
                raise SystemExit(128 + stop.signum)
            if status < 0:  # killed, so it could say nothing itself
                name = signal.Signals(-status).name
                hint = " (out of memory?)" if name == "SIGKILL" else ""
                sys.stderr.write(f"Error: stage '{stage.name}' was ended by {name}{hint}. {_AGAIN} {run_dir}\n")
            if status:
                raise SystemExit(local.USERS_MISTAKE if status == local.USERS_MISTAKE else 1)
            if not stage.is_done(run_dir, plan):
                raise StageError(_did_not_finish(stage.name, run_dir))


def _run_one(
    stage: Stage, run_dir: Path, plan: RunPlan, executor: Any, stop: local.StopSignals, script: list[str]
) -> int:
    if not is_local(executor):
        with run.Experiment(f"upcycle-{run_dir.name}-{stage.name}", enable_goodbye_message=False) as experiment:
            identity = _add(experiment, stage, run_dir, plan, executor, [])
            stop.callback = lambda: experiment.cancel(identity)
            experiment.run(tail_logs=True)
        return 0  # its marker says how it ended
    ranks = _ranks(stage, plan)[1] if stage.parallel else None
    command, logs = _stage_command(stage, run_dir, script), run_dir / "logs" / stage.name
    return local.run_ranks(command, ranks, variables_for(ranks or 1, executor), logs, stop)


def variables_for(ranks: int, executor: Any) -> dict[str, str]:
    """Return the variables of ranks on this machine: the user's, and as many threads as there are cores for."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // ranks))
    return {"OMP_NUM_THREADS": threads, **(executor.env_vars if executor else {})}


def _stage_command(stage: Stage, run_dir: Path, script: list[str]) -> list[str]:
    return [sys.executable, "-m", "nemo_upcycle.pipeline", stage.name, str(run_dir), *script]


def _show_commands(stages: Sequence[Stage], run_dir: Path, plan: RunPlan) -> None:
    """Print what would run on this machine."""
    script = _script(plan)
    for stage in stages:
        command = shlex.join(_stage_command(stage, run_dir, script))
        sys.stdout.write(f"[{stage.name}] ranks: {_ranks(stage, plan)[1]}  {command}\n")


def _script(plan: RunPlan) -> list[str]:
    """Return the script that was started, if a recipe refers to something defined in it."""
    recipes = [load_recipe(text) for text in (plan.pretrain, plan.dense_ct) if text]
    named = any(value.startswith("__main__.") for recipe in recipes for _, value in settings(recipe))
    return [sys.modules["__main__"].__file__ or ""] if named else []


def _add(
    experiment: run.Experiment, stage: Stage, run_dir: Path, plan: RunPlan, executor: Any, before: list[str]
) -> str:
    """Add a stage behind others to an experiment, with an executor of the user's kind and the ranks it needs."""
    mine = sized(executor or run.LocalExecutor(), *_ranks(stage, plan))
    if _chains(mine):
        # Otherwise stages behind a failed one stay queued and the launcher hangs.
        mine.additional_parameters = {"kill_on_invalid_dep": "yes"} | (mine.additional_parameters or {})
    task = run.Partial(run_stage, name=stage.name, dir=str(run_dir))
    return experiment.add(task, executor=mine, name=stage.name, dependencies=before if _chains(mine) else None)


def sized(executor: run.Executor, nodes: int, per_node: int) -> run.Executor:
    """Return a copy of an executor with this many nodes and ranks per node, in the fields that its class has."""
    mine = copy.copy(executor)  # deep enough, as an experiment clones it; and a client of Kubernetes has no deep copy
    for names, value in ((("nodes", "num_nodes"), nodes), (("ntasks_per_node", "nprocs_per_node"), per_node)):
        for name in names:
            if hasattr(mine, name):
                setattr(mine, name, value)
    return mine


def _ranks(stage: Stage, plan: RunPlan) -> tuple[int, int]:
    serialised = getattr(plan, stage.name, None) if stage.parallel else None
    return ranks_of(load_recipe(serialised)) if serialised else (1, 1)


def _stopped(signum: int, stage: Stage, run_dir: Path, plan: RunPlan) -> str:
    """Return the last words of a stopped run: what was kept, and how to continue."""
    done = [entry.name for entry in STAGES[: STAGES.index(stage) + 1] if entry.is_done(run_dir, plan)]
    kept = f"finished stages: {', '.join(done) or 'none'}"
    if stage.resumable:
        last = newest_checkpoint(run_dir / stage.name / "checkpoints")
        kept += f"; last checkpoint of {stage.name}: {last}" if last else f"; no checkpoint of {stage.name} yet"
    return (
        f"\nStopped by {signal.Signals(signum).name} in stage '{stage.name}'. Kept in {run_dir}: {kept}.\n"
        f"Go on with the same command: {_command()}\n"
    )


def _did_not_finish(stage: str, run_dir: Path) -> str:
    return f"Stage '{stage}' did not finish; its message stands above. {_AGAIN} {run_dir}"


def _show_result(run_dir: Path) -> None:
    """Print the report's first paragraph and where to read on."""
    report = run_dir / "report.md"
    headline = report.read_text(encoding="utf-8").split("\n\n")[1]
    sys.stdout.write(f"\n{headline}\n\nReport: {report}\n")
