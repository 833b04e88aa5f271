"""`nemo upcycle pipeline`: checks the recipes, writes the plan, launches the stages as one `run.Experiment`."""

# No postponed annotations here and in the recipes, and Optional[...]: NeMo-Run parses values by them.

import copy
import os
import sys
from pathlib import Path
from typing import Any, Optional

import nemo_run as run

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.evaluation.suite import read_suite_config
from nemo_upcycle.pipeline.markers import setting_hashes
from nemo_upcycle.pipeline.plan import RunPlan, Stage
from nemo_upcycle.pipeline.recipes_io import check_recipe, dump_recipe, load_recipe, ranks_of
from nemo_upcycle.pipeline.runner import run_stage
from nemo_upcycle.pipeline.stages import STAGES, unfinished


class PipelineContext(run.cli.RunContext):
    """Hands the pipeline its recipes as configurations (NeMo-Run would build them here, in the launching process)."""

    def _execute_experiment(self, fn: Any, experiment_args: list[str]) -> None:
        task = self.parse_fn(fn, experiment_args)
        if self.dryrun or not self.skip_confirmation:
            run.dryrun_fn(task, executor=self.executor)
        if not self._should_continue(self.skip_confirmation or self.dryrun):
            return
        try:
            fn(self, **{name: value for name, value in task.__arguments__.items() if name != "ctx"})
        except UpcycleError as error:
            sys.stderr.write(f"Error: {error}\n")
            raise SystemExit(2) from None  # NeMo-Run turns every Exception into status 1


@run.cli.entrypoint(namespace="upcycle", type="experiment", run_ctx_cls=PipelineContext)
def pipeline(
    ctx: run.cli.RunContext,
    dir: str,
    dense: str,
    pretrain: run.Partial,
    dense_ct: Optional[run.Partial] = None,
    corpus: str = "sotu",
    evaluation: str = "demo",
) -> None:
    """Turn a dense checkpoint into a trained, exported and evaluated Mixture-of-Experts model.

    Run it again after a stop of any kind, with the same `dir`: finished stages are skipped, training resumes from its
    last checkpoint.

    Args:
        ctx: NeMo-Run's context of the command.
        dir: folder of the run.
        dense: the dense parent: `asset://smollm2-135m`, `hf://ORG/NAME`, or a Hugging Face folder.
        pretrain: recipe of the upcycled model.
        dense_ct: recipe of its dense twin; None leaves the twin out.
        corpus: what to train on: a name in conf/data, or a YAML file.
        evaluation: what to evaluate: a name in conf/evaluation, or a YAML file.

    Raises:
        UpcycleError: a recipe or the evaluation's settings are not valid, or a stage failed.
    """
    for recipe in filter(None, (pretrain, dense_ct)):
        check_recipe(recipe)
    read_suite_config(evaluation)
    run_dir = Path(dir).absolute()
    twin = dump_recipe(dense_ct) if dense_ct else None
    plan = RunPlan(pretrain.log.name, dense, corpus, evaluation, dump_recipe(pretrain), twin)
    for stage in STAGES:
        if stage.resumable:  # said now, not after the stages before it
            stage.folder(run_dir).require_same(setting_hashes(stage.settings_of(plan)))
    if not ctx.dryrun:
        plan.write(run_dir)
    with run.Experiment(f"upcycle-{run_dir.name}") as experiment:
        _add_stages(experiment, run_dir, plan, ctx.executor)
        if ctx.dryrun:
            experiment.dryrun()
            return
        experiment.run(sequential=not _chains(ctx.executor), detach=ctx.detach, tail_logs=True)
    if not ctx.detach:
        _check_finished(run_dir, plan)
        _show_result(run_dir)


def _chains(executor: Any) -> bool:
    """Return whether the executor's scheduler holds a stage back until the one before it succeeded."""
    return isinstance(executor, run.SlurmExecutor)


def _add_stages(experiment: run.Experiment, run_dir: Path, plan: RunPlan, executor: Any) -> None:
    before: list[str] = []
    for stage in STAGES:
        task = run.Partial(run_stage, name=stage.name, dir=str(run_dir))
        chained = {"dependencies": before} if _chains(executor) and before else {}
        identity = experiment.add(task, executor=_executor_for(stage, plan, executor), name=stage.name, **chained)
        before = [identity]


def _executor_for(stage: Stage, plan: RunPlan, executor: Any) -> run.Executor:
    """Return an executor of the user's kind with the ranks that the stage needs."""
    serialised = getattr(plan, stage.name, None) if stage.parallel else None
    nodes, per_node = ranks_of(load_recipe(serialised)) if serialised else (1, 1)
    if executor is None:
        _put_own_interpreter_first()
        quiet = {"LOGLEVEL": "WARNING", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // per_node))}
        launcher = "torchrun" if serialised else None
        return run.LocalExecutor(ntasks_per_node=per_node, launcher=launcher, env_vars=quiet)
    mine = copy.deepcopy(executor)
    mine.nodes, mine.ntasks_per_node = nodes, per_node
    if _chains(mine):
        # A stage after one that failed would else wait in the queue for ever, and the launcher for it.
        mine.additional_parameters = {"kill_on_invalid_dep": "yes"} | (mine.additional_parameters or {})
    return mine


def _put_own_interpreter_first() -> None:
    """Let NeMo-Run's local jobs find this environment's `python` and `torchrun`, activated or not."""
    own = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", "")])


def _show_result(run_dir: Path) -> None:
    """Print the report's first paragraph and where to read on."""
    report = run_dir / "report.md"
    headline = report.read_text(encoding="utf-8").split("\n\n")[1]
    sys.stdout.write(f"\n{headline}\n\nReport: {report}\n")


def _check_finished(run_dir: Path, plan: RunPlan) -> None:
    if (broken := unfinished(STAGES, run_dir, plan)) is not None:
        raise StageError(
            f"Stage '{broken}' did not finish; its message stands above. "
            f"Run the same command again: it goes on from there. Folder: {run_dir}"
        )
