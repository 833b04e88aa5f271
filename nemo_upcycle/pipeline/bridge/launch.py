"""`nemo upcycle pipeline` where Megatron-Bridge is installed: the chain of stages around a training in it."""

# No postponed annotations here, and Optional[...]: NeMo-Run parses values by them.

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import nemo_run as run

from nemo_upcycle.data.dense import check_address, tokenizer_folder
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.suite_config import read_suite_config
from nemo_upcycle.pipeline.bridge.training import BridgeTraining, parent_configuration
from nemo_upcycle.pipeline.checks import check_blend, check_detach, check_engine, check_folder, check_started, is_local
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
from nemo_upcycle.pipeline.console import quiet_libraries
from nemo_upcycle.pipeline.context import PipelineContext
from nemo_upcycle.pipeline.executors.local import ended_by_ctrl_c
from nemo_upcycle.pipeline.executors.performance import lines_of
from nemo_upcycle.pipeline.executors.settings import cluster_for
from nemo_upcycle.pipeline.jobs import jobs_of, performance_of
from nemo_upcycle.pipeline.order import chosen_stages, finished, require_earlier
from nemo_upcycle.pipeline.plan import RunPlan, Stage
from nemo_upcycle.pipeline.stages import STAGES


class BridgeContext(PipelineContext):
    """Take `pretrain.KEY=VALUE` and `dense_ct.KEY=VALUE` for settings of Bridge's, which has its own parser."""

    def arguments(self, words: list[str]) -> list[str]:
        """Return the words that are this command's own."""
        self.settings: dict[str, list[str]] = {"pretrain": [], "dense_ct": []}
        rest = []
        for word in super().arguments(words):
            stage, _, setting = word.partition(".")
            if stage in self.settings:
                self.settings[stage].append(setting)
            else:
                rest.append(word)
        return rest


@run.cli.entrypoint(namespace="upcycle", type="experiment", run_ctx_cls=BridgeContext)
def pipeline(
    ctx: run.cli.RunContext,
    dir: str,
    dense: str,
    recipe: str,
    dense_ct: Optional[str] = None,
    data: str = "sotu",
    evaluation: str = "demo",
    gpus: Optional[int] = None,
    gpus_per_node: int = 8,
    from_stage: Optional[str] = None,
    until_stage: Optional[str] = None,
    only_stage: Optional[str] = None,
    render: Optional[str] = None,
) -> None:
    """Turn a dense checkpoint into a trained, exported and evaluated Mixture-of-Experts model, with Megatron-Bridge.

    Run it again after a stop of any kind, with the same `dir`: finished stages are skipped, training resumes from its
    last checkpoint. `pretrain.KEY=VALUE` and `dense_ct.KEY=VALUE` change a recipe as Bridge's command line does.

    Args:
        ctx: NeMo-Run's context of the command.
        dir: folder of the run.
        dense: the dense parent: `asset://smollm2-135m`, `hf://ORG/NAME`, or a Hugging Face folder.
        recipe: of the upcycled model, by Bridge's naming; `package.module:function` for one of your own.
        dense_ct: recipe of the dense baseline; None omits it.
        data: what to train on: a blend (a name in conf/data, or a YAML file), or a finished folder of `nemo-upcycle`.
        evaluation: what to evaluate: a name in conf/evaluation, or a YAML file.
        gpus: ranks of both trainings; None takes the recipe's, from its name.
        gpus_per_node: how many of them a node has.
        from_stage: `--from STAGE`: start with this one; those before it must be finished.
        until_stage: `--until STAGE`: end after this one.
        only_stage: `--only STAGE`: this one alone.
        render: `--render FOLDER`: write what would be submitted there, and submit nothing; needs no cluster.

    Raises:
        UpcycleError: an argument or a recipe is not valid, or a stage did not finish.
    """
    quiet_libraries()
    run_dir = Path(dir).expanduser().absolute()
    context: Any = ctx
    trainings = {
        stage: _training(name, context.settings[stage], gpus, gpus_per_node)
        for stage, name in (("pretrain", recipe), ("dense_ct", dense_ct))
        if name
    }
    if context.settings["dense_ct"] and not dense_ct:
        raise UpcycleError(
            f"dense_ct.{context.settings['dense_ct'][0]}",
            got="no recipe of a dense baseline",
            expected="dense_ct=NAME beside it",
            fix="give dense_ct=NAME, or omit the setting",
        )
    plan = RunPlan(
        recipe,
        whole_path(dense, folder=True),
        whole_path(data, folder=True),
        whole_path(evaluation),
        trainings["pretrain"].to_text(),
        trainings["dense_ct"].to_text() if dense_ct else None,
        trainer="bridge",
    )
    stages = chosen_stages(from_stage, until_stage, only_stage)
    with ended_by_ctrl_c():
        _check(run_dir, plan, trainings, ctx, stages, shown=bool(ctx.dryrun or render))
        require_earlier(stages, run_dir, plan)
    jobs, cluster = jobs_of(stages, run_dir, plan), cluster_for(ctx.executor)
    if render:
        render_jobs(jobs, cluster, plan, Path(render))
        return
    sys.stdout.write(_summary(plan, trainings, stages, run_dir))
    sys.stdout.write("".join(f"{line}\n" for line in lines_of(performance_of(jobs, cluster, ctx.executor))))
    if ctx.dryrun:
        if cluster:
            say_what_is_missing("be submitted", lambda: cluster.check_settings(jobs))
        elif is_local(ctx.executor):
            say_what_is_missing("run here", lambda: _check_here(plan, stages, trainings))
        return
    if cluster:
        cluster.check_settings(jobs)
    chain = chain_of(cluster, jobs, run_dir, plan)
    if chain:
        check_chain(chain)
    if not context.may_go_on():
        return
    with started(run_dir, plan, chain):
        run_jobs(jobs, run_dir, plan, chain, ctx)
    if stages[-1] is STAGES[-1] and not ctx.detach:
        show_result(run_dir)


def _training(recipe: str, settings: Sequence[str], gpus: int | None, gpus_per_node: int) -> BridgeTraining:
    """Return the training of a recipe on its GPUs."""
    named = re.search(r"_(\d+)gpu_", recipe)
    ranks = int(named[1]) if gpus is None and named else gpus
    if ranks is None:
        raise UpcycleError(
            "gpus",
            got=None,
            expected="how many ranks train: the name of the recipe does not say it",
            fix="give gpus=N",
        )
    for name, number in (("gpus", ranks), ("gpus_per_node", gpus_per_node)):
        if number < 1:
            raise UpcycleError(name, got=number, expected="1 or more", fix=f"give {name}=8")
    per_node = min(ranks, gpus_per_node)
    if ranks % per_node:
        raise UpcycleError(
            "gpus", got=ranks, expected=f"a multiple of gpus_per_node ({gpus_per_node})", fix="change one of them"
        )
    return BridgeTraining(recipe, tuple(settings), ranks // per_node, per_node)


def _check(
    run_dir: Path,
    plan: RunPlan,
    trainings: dict[str, BridgeTraining],
    ctx: Any,
    stages: Sequence[Stage],
    *,
    shown: bool,
) -> None:
    """Check every argument before anything is written or launched; of a parent on the hub, fetch its configuration."""
    from nemo_upcycle.bridge.training import find_recipe

    check_folder(run_dir)
    check_detach(ctx)
    check_address(plan.dense)
    check_blend(plan.data, remote=not shown)
    read_suite_config(plan.evaluation)
    runs_here = is_local(ctx.executor) and not shown
    if runs_here:
        _check_here(plan, stages, trainings)
    # Fetched, where it is needed here, or an error that says why it cannot be.
    parent = tokenizer_folder(plan.dense) if runs_here else parent_configuration(plan.dense)
    for stage, training in trainings.items():
        if parent is None:  # not within reach, and to be fetched elsewhere
            find_recipe(training.recipe)
        else:
            _check_recipe(stage, training, parent)
    check_started(run_dir, plan)


def _check_here(plan: RunPlan, stages: Sequence[Stage], trainings: Mapping[str, BridgeTraining]) -> None:
    """Check what stages ask of this machine, where they run on it."""
    check_engine(plan, stages)
    for stage, training in trainings.items():
        if training.nodes > 1 and any(one.name == stage for one in stages):
            raise UpcycleError(
                "gpus",
                got=f"{training.nodes * training.ranks_per_node} of recipe {training.recipe}",
                expected="those of this machine",
                fix="give gpus=1, or name the cluster with run.executor=NAME",
            )


def _check_recipe(stage: str, training: BridgeTraining, dense_folder: Path) -> None:
    from nemo_upcycle.bridge.training import required_hook
    from nemo_upcycle.training.layout import BRIDGE_SETTINGS, check_layout
    from nemo_upcycle.training.values import check_values

    config = training.config(dense_folder)
    check_values(config, "bridge", f"{stage}.")
    hook = required_hook(config)
    if (hook.spec is None) != (stage == "dense_ct"):
        wanted = "a dense model's recipe" if stage == "dense_ct" else "an upcycled model's"
        name = "dense_ct" if stage == "dense_ct" else "recipe"
        raise UpcycleError(name, got=training.recipe, expected=wanted, fix="name another one")
    if config.model.seq_length != config.dataset.seq_length:
        raise UpcycleError(
            f"{stage}.model.seq_length",
            got=config.model.seq_length,
            expected=f"dataset.seq_length, {config.dataset.seq_length}",
            fix="set both",
        )
    data = SimpleNamespace(
        seq_length=config.dataset.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
    )
    ranks = training.nodes * training.ranks_per_node
    try:
        check_layout(config.model, config.model, data, ranks, BRIDGE_SETTINGS)
        hook.check()
    except UpcycleError as error:
        raise error.renamed(lambda name: f"{stage}.{name}".replace(".config.", ".") if "." in name else name) from None


def _summary(plan: RunPlan, trainings: dict[str, BridgeTraining], stages: Sequence[Stage], run_dir: Path) -> str:
    """Return what will run, and what is there already."""
    done = [name for name in finished(run_dir, plan) if name in {stage.name for stage in stages}]
    lines = [f"{plan.dense} in {run_dir}: {', '.join(stage.name for stage in stages)}"]
    lines += [f"done before: {', '.join(done)}"] if done else []
    for stage, training in trainings.items():
        settings = "".join(f" {setting}" for setting in training.overrides)
        lines.append(f"{stage}: {training.recipe} on {training.nodes} x {training.ranks_per_node} ranks{settings}")
    return "\n".join(lines) + "\n"
