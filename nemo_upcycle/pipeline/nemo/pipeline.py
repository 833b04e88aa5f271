"""`nemo upcycle pipeline` with recipes of NeMo."""

# No postponed annotations here and in the recipes, and Optional[...]: NeMo-Run parses values by them.

from pathlib import Path
from typing import Optional

import nemo_run as run

from nemo_upcycle.pipeline.context import PipelineContext
from nemo_upcycle.pipeline.launch import absolute_argument, launch_chain
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.trainers.nemo.recipes import dump_recipe


@run.cli.entrypoint(namespace="upcycle", type="experiment", run_ctx_cls=PipelineContext)
def pipeline(
    ctx: run.cli.RunContext,
    dir: str,
    dense: str,
    pretrain: run.Partial,
    dense_ct: Optional[run.Partial] = None,
    data: str = "sotu",
    evaluation: str = "demo",
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
        from_stage: `--from STAGE`: start with this one; those before it must be finished.
        until_stage: `--until STAGE`: end after this one.
        only_stage: `--only STAGE`: this one alone.
        render: `--render FOLDER`: write what would be submitted there, and submit nothing; needs no cluster.

    Raises:
        UpcycleError: an argument or a recipe is not valid, or a stage did not finish.
    """
    plan = RunPlan(
        pretrain.log.name,
        absolute_argument(dense, folder=True),
        absolute_argument(data, folder=True),
        absolute_argument(evaluation),
        dump_recipe(pretrain),
        dump_recipe(dense_ct) if dense_ct else None,
    )
    run_dir = Path(dir).expanduser().absolute()
    launch_chain(ctx, run_dir, plan, pipeline, first=from_stage, last=until_stage, only=only_stage, render=render)
