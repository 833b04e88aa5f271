"""`nemo upcycle pipeline`: check the arguments, write the plan, and run the stages one after the other."""

# No postponed annotations here and in the recipes, and Optional[...]: NeMo-Run parses values by them.

import sys
from pathlib import Path
from typing import Optional

import nemo_run as run

from nemo_upcycle.pipeline.checks import check_arguments, check_here, is_local
from nemo_upcycle.pipeline.commands import (
    chain_of,
    check_chain,
    render_jobs,
    run_jobs,
    say_what_is_missing,
    show_result,
    started,
    whole_path,
)
from nemo_upcycle.pipeline.context import PipelineContext
from nemo_upcycle.pipeline.executors.base import masked_executor
from nemo_upcycle.pipeline.executors.local import ended_by_ctrl_c
from nemo_upcycle.pipeline.executors.settings import cluster_for
from nemo_upcycle.pipeline.forecast import check_space, check_stages, forecast, render_forecast
from nemo_upcycle.pipeline.forecast.settings import Origins
from nemo_upcycle.pipeline.jobs import jobs_of
from nemo_upcycle.pipeline.order import chosen_stages, require_earlier
from nemo_upcycle.pipeline.plan import RunPlan
from nemo_upcycle.pipeline.recipes_io import dump_recipe, write_recipes
from nemo_upcycle.pipeline.stages import STAGES


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
    render: Optional[str] = None,
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
        render: `--render FOLDER`: write what would be submitted there, and submit nothing; needs no cluster.

    Raises:
        UpcycleError: an argument or a recipe is not valid, or a stage did not finish.
    """
    run_dir = Path(dir).expanduser().absolute()
    plan = RunPlan(
        pretrain.log.name,
        whole_path(dense, folder=True),
        whole_path(corpus or data, folder=True),
        whole_path(evaluation),
        dump_recipe(pretrain),
        dump_recipe(dense_ct) if dense_ct else None,
    )
    recipes = {"pretrain": pretrain} | ({"dense_ct": dense_ct} if dense_ct else {})
    stages = chosen_stages(from_stage, until_stage, only_stage)
    cluster = cluster_for(ctx.executor)
    with ended_by_ctrl_c():
        check_arguments(run_dir, plan, recipes, ctx, stages, shown=bool(ctx.dryrun or render))
        require_earlier(stages, run_dir, plan)
    jobs = jobs_of(stages, run_dir, plan)
    if render:
        render_jobs(jobs, cluster, plan, Path(render))
        return
    by_name, origins = {job.name: job for job in jobs}, Origins(sys.argv[1:], pipeline)
    shown = cluster and cluster.masked(), by_name, origins, masked_executor(ctx.executor)
    found = forecast(stages, run_dir, plan, pretrain, dense_ct, *shown)
    if ctx.dryrun or not ctx.skip_confirmation:
        sys.stdout.write(render_forecast(found) + "\n")
    if ctx.dryrun:
        if cluster:
            say_what_is_missing("be submitted", lambda: cluster.check_settings(jobs))
        elif is_local(ctx.executor):
            say_what_is_missing("run here", lambda: check_here(plan, stages, recipes))
        return
    check_stages(found)
    if cluster:
        cluster.check_settings(jobs)  # before the scheduler is asked anything
    chain = chain_of(cluster, jobs, run_dir, plan)
    if chain:
        check_chain(chain)
    check_space(found, chain.alive() if chain else ())
    if not ctx.may_go_on():
        return
    with started(run_dir, plan, chain):
        write_recipes(run_dir, {"pretrain": pretrain, "dense_ct": dense_ct})
        run_jobs(jobs, run_dir, plan, chain, ctx)
    if stages[-1] is STAGES[-1] and not ctx.detach:
        show_result(run_dir)
