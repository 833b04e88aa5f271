"""`nemo upcycle pipeline` in an environment of Megatron-Bridge: the chain of stages around a training with Bridge."""

# Do not postpone annotations in this module, and write Optional[...]: NeMo-Run reads annotations to parse values.

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Optional

import nemo_run as run

from nemo_upcycle.data.blend import DEMO
from nemo_upcycle.errors import UpcycleError, failures
from nemo_upcycle.pipeline.checks import check_demo_data
from nemo_upcycle.pipeline.context import PipelineContext, entrypoint
from nemo_upcycle.pipeline.launch import launch_chain
from nemo_upcycle.pipeline.order import chosen_stages
from nemo_upcycle.pipeline.rewind import Rewind
from nemo_upcycle.pipeline.stages import RunPlan
from nemo_upcycle.planning.hardware import known_gpu
from nemo_upcycle.planning.recipe_table import KnownRecipe, job_of
from nemo_upcycle.recipes import known_recipes, where_recipes_are
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.training import BridgeTraining
from nemo_upcycle.utils.console import quiet_libraries
from nemo_upcycle.utils.validation import check_whole


#: Prefixes of the settings under `upcycling`. Commands of release 0.3 used `spec.`.
_NODE = ("upcycling.", "spec.")


class BridgeContext(PipelineContext):
    """Command line that takes `pretrain.KEY=VALUE` and `dense_ct.KEY=VALUE` as settings for Bridge's own parser."""

    def arguments(self, words: list[str]) -> list[str]:
        """Set Bridge's settings aside, and return the words of this command."""
        self.settings: dict[str, list[str]] = {"pretrain": [], "dense_ct": []}
        rest = []
        for word in super().arguments(words):
            stage, _, setting = word.partition(".")
            if stage in self.settings:
                self.settings[stage].append(setting)
            else:
                rest.append(word)
        return rest


@entrypoint(BridgeContext)
def pipeline(
    ctx: run.cli.RunContext,
    dir: str,
    dense: str,
    recipe: str,
    dense_ct: Optional[str] = None,
    data: Optional[str] = None,
    evaluation: str = "demo",
    gpus: Optional[int] = None,
    gpus_per_node: Optional[int] = None,
    from_stage: Optional[str] = None,
    until_stage: Optional[str] = None,
    only_stage: Optional[str] = None,
    render: Optional[str] = None,
    rewind: Optional[str] = None,
    skip_steps: Optional[str] = None,
    notify: Optional[str] = None,
) -> None:
    """Turn a dense checkpoint into a trained, exported and evaluated Mixture-of-Experts model, with Megatron-Bridge.

    After a stop of any kind, run it again with the same `dir`: finished stages are skipped, and training resumes from
    its last checkpoint. `pretrain.KEY=VALUE` and `dense_ct.KEY=VALUE` change a recipe as on Bridge's own command line;
    `pretrain.upcycling.FIELD=VALUE` changes its UpcycleSpec.

    Args:
        ctx: NeMo-Run's context of the command.
        dir: folder of the run: a new one, an empty one, or the run's own.
        dense: dense parent: `asset://smollm2-135m`, `hf://ORG/NAME`, or a Hugging Face folder.
        recipe: recipe of the upcycled model, as Bridge names it; `package.module:function` for your own recipe.
        dense_ct: recipe of the dense baseline; None omits the baseline. If `dense_ct` equals `recipe`, the recipe
            trains the parent without upcycling the parent.
        data: training data: a blend (a name in conf/data, or a YAML file), or a finished folder of `nemo-upcycle`; for
            fine-tuning recipes, conversations (a name in conf/chat, a YAML file, or JSON lines); if None, the demo's
            speeches are used, which is refused if a training is for GPUs.
        evaluation: evaluation suite: a name in conf/evaluation, or a YAML file.
        gpus: ranks of each training; if None, the number for which the recipe is made.
        gpus_per_node: ranks per node; if None, the number of GPUs in a node with the recipe's GPU, or 8 if the recipe
            names no GPU.
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
    quiet_libraries()
    context: Any = ctx
    trainings = {
        stage: training_of(name, context.settings[stage], gpus, gpus_per_node)
        for stage, name in (("pretrain", recipe), ("dense_ct", dense_ct))
        if name
    }
    if context.settings["dense_ct"] and not dense_ct:
        raise UpcycleError(
            f"dense_ct.{context.settings['dense_ct'][0]}",
            kind="refused",
            got="changes the dense baseline, and no recipe for a baseline is given",
            fix="give dense_ct=NAME, or omit the setting",
        )
    if dense_ct == recipe:
        trainings["dense_ct"] = replace(trainings["dense_ct"], changes="null")
    baseline = trainings["dense_ct"].to_text() if dense_ct else None
    texts = trainings["pretrain"].to_text(), baseline
    read = DEMO if data is None else data
    plan = RunPlan(recipe, dense, read, evaluation, *texts, trainer="bridge", notify=notify or "")
    wrong = failures([partial(check_demo_data, plan)]) if data is None else []
    stages, back = chosen_stages(from_stage, until_stage, only_stage), Rewind.read(rewind, skip_steps)
    launch_chain(ctx, dir, plan, stages=stages, render=render, rewind=back, wrong=wrong)


def training_of(
    recipe: str, settings: Sequence[str], gpus: int | None, gpus_per_node: int | None = None
) -> BridgeTraining:
    """Return the training of a recipe on its GPUs.

    Args:
        recipe: name of the recipe.
        settings: `KEY=VALUE`, as Bridge's command line takes it; `upcycling.FIELD=VALUE` for the UpcycleSpec.
        gpus: ranks; if None, the number for which the recipe is made.
        gpus_per_node: ranks per node; if None, the number of GPUs in a node with the recipe's GPU, or 8 if the recipe
            names no GPU.

    Raises:
        UpcycleError: the number of ranks is unknown, or does not fill whole nodes.
    """
    from nemo_upcycle.trainers.bridge.config import find_recipe  # imports Bridge

    job = job_of(find_recipe(recipe))
    ranks = job.gpus if gpus is None else gpus
    if ranks is None:
        raise UpcycleError(
            field="gpus",
            kind="missing",
            got=f"is missing, and the recipe {recipe} does not say how many ranks train",
            fix="give gpus=N, or write @on_gpus(N) above the recipe",
        )
    check_whole("gpus", ranks, 1)
    if gpus_per_node is None:
        gpus_per_node = known_gpu(job.gpu).per_node if job.gpu else 8
    check_whole("gpus_per_node", gpus_per_node, 1)
    per_node = min(ranks, gpus_per_node)
    if ranks % per_node:
        raise UpcycleError(
            field="gpus",
            got=ranks,
            expected=f"a multiple of gpus_per_node ({gpus_per_node})",
            fix="change one of them",
        )
    others = tuple(word for word in settings if not word.startswith(_NODE))
    changes = json.dumps(_fields(word.partition(".")[2] for word in settings if word.startswith(_NODE)))
    return BridgeTraining(recipe, others, ranks // per_node, per_node, changes=changes)


def _fields(words: Iterable[str]) -> dict[str, Any]:
    """Parse `FIELD=VALUE` words into fields of the spec, each with the type of its default."""
    fields, default = dict[str, Any](), asdict(UpcycleSpec())
    for name, _, value in (word.partition("=") for word in words):
        if name not in default:
            raise UpcycleError.unknown("pretrain.upcycling: field", name, default)
        kind = type(default[name])
        try:
            fields[name] = kind(value)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            raise UpcycleError(
                f"pretrain.upcycling.{name}", got=f"'{value}'", expected=expected, fix="correct the value"
            ) from None
    return fields


def chain(known: KnownRecipe) -> Callable[..., run.Partial]:
    """Register and return the chain of an upcycled model and its dense baseline, with the name and inputs as in NeMo.

    Args:
        known: description of a recipe that Bridge has.
    """
    name, inputs = known.name, known.inputs

    @run.cli.factory(target=pipeline, name=name)
    def pipeline_recipe(dir: str = f"runs/{name}", dense: str = inputs["dense"]) -> run.Partial:
        """Create the whole chain: import, data, upcycle, pretrain, dense baseline, export, evaluate, report.

        Args:
            dir (str): Folder of the run, which all nodes share.
            dense (str): Dense checkpoint to start from: a folder or `hf://ORG/NAME`.

        Returns:
            run.Partial: Partial configuration of the pipeline.

        Examples:
            CLI usage:
                $ nemo upcycle pipeline --factory NAME dir=runs/first pretrain.train.train_iters=4 --yes
                $ nemo upcycle pipeline --factory NAME run.executor=slurm dir=/shared/runs/first --yes
        """
        trained = {"recipe": known.bridge, "dense_ct": known.bridge_baseline}
        return run.Partial(pipeline, dir=dir, **trained, **(inputs | {"dense": dense}))

    return pipeline_recipe


pipeline.cli_entrypoint.help_str += f"\n\n {where_recipes_are()}"
for found in known_recipes().values():
    if found.bridge:
        chain(found)
