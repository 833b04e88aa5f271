"""Commands for NeMo's recipes: `nemo upcycle pipeline`, and `nemo llm pretrain` and `finetune` with checks first."""

# Do not postpone annotations here or in the recipes, and write Optional[...]: NeMo-Run reads annotations to parse
# values.

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Optional

import nemo_run as run

from nemo_upcycle.data.blend import DEMO
from nemo_upcycle.errors import UpcycleError, failures
from nemo_upcycle.pipeline.answers import answered, of_another_trainer
from nemo_upcycle.pipeline.checks import check_demo_data
from nemo_upcycle.pipeline.context import CheckedContext, PipelineContext, entrypoint, factories, mistake_of
from nemo_upcycle.pipeline.executors.base import is_local
from nemo_upcycle.pipeline.launch import launch_chain
from nemo_upcycle.pipeline.order import chosen_stages
from nemo_upcycle.pipeline.rewind import Rewind
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.trainers.nemo.checks import (
    check_calibration,
    check_data,
    check_own_data,
    check_parent,
    check_recipe,
    parents_of,
)
from nemo_upcycle.trainers.nemo.recipes import PLACED_PARTS, dump_recipe, ignored_settings
from nemo_upcycle.trainers.nemo.starting import lacking_here, wrong_in
from nemo_upcycle.trainers.nemo.upcycling import UpcycleConfig
from nemo_upcycle.trainers.settings import all_wrong, setting
from nemo_upcycle.utils.ranks import is_first_rank


@entrypoint(PipelineContext)
def pipeline(
    ctx: run.cli.RunContext,
    dir: str,
    dense: str,
    pretrain: run.Partial,
    dense_ct: Optional[run.Partial] = None,
    data: Optional[str] = None,
    evaluation: str = "demo",
    from_stage: Optional[str] = None,
    until_stage: Optional[str] = None,
    only_stage: Optional[str] = None,
    render: Optional[str] = None,
    rewind: Optional[str] = None,
    skip_steps: Optional[str] = None,
    notify: Optional[str] = None,
) -> None:
    """Turn a dense checkpoint into a trained, exported and evaluated Mixture-of-Experts model.

    After a stop of any kind, run it again with the same `dir`: finished stages are skipped, and training resumes from
    its last checkpoint.

    Args:
        ctx: NeMo-Run's context of the command.
        dir: folder of the run: a new one, an empty one, or the run's own.
        dense: dense parent: `asset://smollm2-135m`, `hf://ORG/NAME`, or a Hugging Face folder.
        pretrain: recipe of the upcycled model.
        dense_ct: recipe of the dense baseline; None omits the baseline.
        data: training data: a blend (a name in conf/data, or a YAML file), or a finished folder of `nemo-upcycle`;
            if None, the demo's speeches are used, which is refused if a training is for GPUs.
        evaluation: evaluation suite: a name in conf/evaluation, or a YAML file.
        from_stage: `--from STAGE`: first stage to run; earlier stages must be finished.
        until_stage: `--until STAGE`: last stage to run.
        only_stage: `--only STAGE`: the only stage to run.
        render: `--render FOLDER`: write everything that would be submitted to FOLDER, and submit nothing; needs no
            cluster.
        rewind: `--rewind STEP`: continue the training from its kept checkpoint after this step, with settings that may
            then change: rates, schedule, weight decay, clipping, balancing. `--rewind dense_ct:STEP` for the baseline.
        skip_steps: `--skip-steps FIRST:LAST`: with `--rewind`, leave out the samples of these steps, both included.
        notify: your command, which runs at each stop and at the end. It reads the message on its standard input, and
            the variables `NEMO_UPCYCLE_EVENT` (stopped, failed or done), `NEMO_UPCYCLE_STAGE` and `NEMO_UPCYCLE_DIR`.

    Raises:
        UpcycleError: an argument or a recipe is invalid, or a stage did not finish.
    """
    baseline = dump_recipe(dense_ct) if dense_ct else None
    trainings = dump_recipe(pretrain), baseline
    plan = RunPlan(
        pretrain.log.name, dense, DEMO if data is None else data, evaluation, *trainings, notify=notify or ""
    )
    wrong = [*_ignored(ctx, {"pretrain": pretrain, "dense_ct": dense_ct})]
    wrong += failures([partial(check_demo_data, plan)]) if data is None else []
    stages, back = chosen_stages(from_stage, until_stage, only_stage), Rewind.read(rewind, skip_steps)
    launch_chain(ctx, dir, plan, stages=stages, render=render, rewind=back, wrong=wrong)


def _ignored(ctx: Any, recipes: Mapping[str, Optional[run.Partial]]) -> Iterator[UpcycleError]:
    """Yield an error for each setting on the command line or in a YAML file that the stages would replace.

    Args:
        ctx: NeMo-Run's context of the command.
        recipes: recipe of each training, by stage.
    """
    usual = ctx.without_settings(tuple(f"{stage}.{part}" for stage in recipes for part in PLACED_PARTS))
    for stage, recipe in recipes.items() if usual else ():
        if recipe and (before := getattr(usual, stage, None)):
            yield from ignored_settings(recipe, before, f"{stage}.")


class PretrainContext(CheckedContext):
    """NeMo's context of `nemo llm pretrain` and `finetune`, which checks this package's recipes before they start."""

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        """Check this package's recipes, and leave the command lines of other recipes to NeMo-Run."""
        factory = factories(fn).get(str(self.factory).partition("(")[0])
        if getattr(factory, "__module__", "").startswith("nemo_upcycle."):
            super().cli_execute(fn, args, entrypoint_type)
            return
        others = _OthersContext(name=self.name)
        others.__dict__.update(vars(self))
        with answered():
            others.cli_execute(fn, args, entrypoint_type)

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> Any:
        """Parse the recipe and check it."""
        return _checked(super().parse_fn(fn, args, **default_kwargs), self)


class _OthersContext(run.cli.RunContext):
    """NeMo-Run's own context, which also checks a user's recipe (factory or YAML file) if the recipe upcycles."""

    def parse_fn(self, fn: Any, args: list[str], **default_kwargs: Any) -> Any:
        try:
            task = super().parse_fn(fn, args, **default_kwargs)
        except Exception:
            name = str(self.factory)
            if mistake := mistake_of(name) or of_another_trainer(name.partition("(")[0]):
                raise mistake from None
            raise
        restore = setting(task, "resume.restore_config")
        return _checked(task, self) if getattr(restore, "__fn_or_cls__", None) is UpcycleConfig else task


def _checked(task: run.Partial, ctx: run.cli.RunContext) -> run.Partial:
    """Check a training that `nemo llm pretrain` or `finetune` is about to start."""
    is_here, parents = is_local(ctx.executor) and not ctx.dryrun, parents_of(task)

    def check() -> None:
        check_recipe(task)
        check_own_data(task)
        check_calibration(task, here=is_here)
        if is_local(ctx.executor):
            check_data(task)
            for parent in parents:
                check_parent(task, parent, remote=False)

    def construct() -> Iterator[UpcycleError]:
        if is_here:
            yield from lacking_here(task)
        if is_first_rank():
            yield from wrong_in(task, parents[0], f"recipe {task.log.name}")

    if wrong := all_wrong(task, "nemo", "", check, construct):
        raise UpcycleError.together(wrong)
    if is_here and is_first_rank():
        for parent in parents:
            check_parent(task, parent, remote=True)
    return task
