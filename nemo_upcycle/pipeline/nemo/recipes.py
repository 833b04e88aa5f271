"""Register the recipes of `recipes/` with NeMo-Run: models, trainings, and the chain around each upcycled model.

`nemo llm pretrain --factory llama3_8b_e8t2` calls `e8t2` of `recipes/llama3_8b.py`.
`nemo upcycle pipeline --factory llama3_8b_e8t2` calls the chain that this module makes of that recipe and its dense
baseline.
"""

# Do not postpone annotations in this module, and write Optional[...]: NeMo-Run reads annotations to parse values.

import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, Optional

from nemo_upcycle.planning.recipe_table import ANSWERS, CONVERSATIONS
from nemo_upcycle.recipes import modules, nemo_functions, where_recipes_are
from nemo_upcycle.trainers.nemo.imports import quiet_imports


with quiet_imports():
    import lightning.pytorch as pl
    import nemo_run as run
    from nemo.collections.llm.api import finetune, pretrain

    from nemo_upcycle.pipeline.nemo.pipeline import PretrainContext, pipeline
    from nemo_upcycle.trainers.nemo.few_steps_recipe import fit_laptop, laptop_ranks
    from nemo_upcycle.trainers.nemo.tuning_recipe import is_lora

    importlib.import_module("nemo_upcycle.pipeline.ablations.launch")  # `nemo upcycle ablate`

#: Model of the demo. A laptop trains the model on two ranks, and has enough memory if layers are recomputed.
_ON_LAPTOPS = "smollm2_135m"


def register() -> None:
    """Register everything, and name the folder of recipes in the help of the pipeline."""
    # `nemo llm pretrain` and `finetune` are NeMo's own commands. With a recipe of this package they check the
    # arguments first; with other recipes nothing changes.
    pretrain.cli_entrypoint.run_ctx_cls = finetune.cli_entrypoint.run_ctx_cls = PretrainContext
    pipeline.cli_entrypoint.help_str += f"\n\n {where_recipes_are()}"
    for name, function in nemo_functions().items():
        is_tuning = "start" in inspect.signature(function).parameters
        run.cli.factory(target=finetune if is_tuning else pretrain, name=name)(function)
    for model, recipe in modules().items():
        for kind, make in (("dense_ct", "dense_model"), ("e8t2", "moe_model")):
            if hasattr(recipe, make):
                _register_model(f"{model}_{kind}", getattr(recipe, make))
        for name, chain in chains(model, recipe).items():
            run.cli.factory(target=pipeline, name=name)(chain)


def _register_model(name: str, make: Callable[[], Any]) -> None:
    def model() -> run.Config[pl.LightningModule]:
        return make()

    model.__doc__ = make.__doc__
    run.cli.factory(name=name)(model)


def chains(model: str, recipe: ModuleType) -> dict[str, Callable[..., run.Partial]]:
    """Make the chains of a model's file, and return them by their names on the command line.

    Args:
        model: name of the model.
        recipe: module of the file.
    """
    if not hasattr(recipe, "e8t2") or not hasattr(recipe, "LAYOUTS"):
        return {}
    makes = _few_steps_chain if recipe.CAPACITY_FACTOR is None else _cluster_chain
    found = {f"{model}_e8t2": makes(f"{model}_e8t2", recipe)}
    if hasattr(recipe, "e8t2_sft"):
        found[f"{model}_e8t2_sft"] = _tuning_chain(f"{model}_e8t2_sft", recipe, model == _ON_LAPTOPS)
    return found


def _cluster_chain(name: str, recipe: ModuleType) -> Callable[..., run.Partial]:
    nodes, parent, blend = recipe.LAYOUTS["h100"]["e8t2"].nodes, recipe.PARENT, recipe.DATA

    def pipeline_recipe(
        dir: str = f"runs/{name}",
        num_nodes: int = nodes,
        num_gpus_per_node: int = 8,
        performance_mode: bool = False,
        dense: str = parent,
        data: str = blend,
    ) -> run.Partial:
        """Create the whole chain: import, data, upcycle, pretrain, dense baseline, export, evaluate, report.

        Args:
            dir (str): Folder of the run.
            num_nodes (int): Number of compute nodes of the two trainings.
            num_gpus_per_node (int): Number of GPUs per node.
            performance_mode (bool): Use the recipes' performance mode in both trainings.
            dense (str): Dense checkpoint to start from: a folder or `hf://ORG/NAME`.
            data (str): Blend, or finished folder of `nemo-upcycle data`.

        Returns:
            run.Partial: Partial configuration of the pipeline.

        Examples:
            CLI usage:
                $ nemo upcycle pipeline --factory NAME dense=/models/dense data=/data/blend dir=runs/first --until data
                $ python cluster.py --factory NAME dir=runs/first run.executor=my_cluster --yes
        """
        sizes = {"num_nodes": num_nodes, "num_gpus_per_node": num_gpus_per_node, "performance_mode": performance_mode}
        return run.Partial(
            pipeline,
            dir=dir,
            dense=dense,
            pretrain=recipe.e8t2(dense=dense, **sizes),
            dense_ct=recipe.dense_ct(dense=dense, **sizes),
            data=data,
            evaluation=recipe.EVALUATION,
        )

    return pipeline_recipe


def _few_steps_chain(name: str, recipe: ModuleType) -> Callable[..., run.Partial]:
    parent, on_laptops = recipe.PARENT, name.startswith(_ON_LAPTOPS)

    def pipeline_recipe(
        dir: str = f"runs/{name}", dense: str = parent, processes: Optional[int] = None
    ) -> run.Partial:
        """Create the whole chain: import, data, upcycle, pretrain, dense baseline, export, evaluate, report.

        Args:
            dir (str): Folder of the run.
            dense (str): Dense checkpoint to start from: a folder or `hf://ORG/NAME`.
            processes (int | None): Ranks of each training; the experts are spread over the ranks. If None, each
                training has one rank; the demo has two ranks, or one rank on a machine with one GPU.

        Returns:
            run.Partial: Partial configuration of the pipeline.

        Examples:
            CLI usage:
                $ nemo upcycle pipeline --factory NAME dir=runs/first --yes
                $ nemo upcycle pipeline --factory NAME dir=runs/more pretrain.trainer.max_steps=100 --yes
        """
        ranks = processes or (laptop_ranks() if on_laptops else 1)
        moe = recipe.e8t2(num_gpus_per_node=ranks, expert_parallelism=ranks, dense=dense)
        return run.Partial(
            pipeline,
            dir=dir,
            dense=dense,
            pretrain=fit_laptop(moe) if on_laptops else moe,
            dense_ct=recipe.dense_ct(num_gpus_per_node=ranks, dense=dense),
            data=recipe.DATA,
        )

    return pipeline_recipe


def _tuning_chain(name: str, recipe: ModuleType, on_laptops: bool) -> Callable[..., run.Partial]:
    parent, usual = recipe.TUNING.parent, inspect.signature(recipe.e8t2_sft).parameters["peft_scheme"].default

    def pipeline_recipe(
        dir: str = f"runs/{name}",
        dense: str = parent,
        data: str = CONVERSATIONS,
        peft_scheme: Optional[str] = usual,
    ) -> run.Partial:
        """Create the whole chain: import, pack, upcycle, tune, tune the dense parent, export, evaluate, report.

        Args:
            dir (str): Folder of the run.
            dense (str): Dense parent, whose chat template is used.
            data (str): Conversations: a name in conf/chat, a YAML file, JSON lines, or a finished folder.
            peft_scheme (str | None): `lora` trains adapters and routers in both tunings; `none` trains all weights.

        Returns:
            run.Partial: Partial configuration of the pipeline.

        Examples:
            CLI usage:
                $ nemo upcycle pipeline --factory qwen3_600m_e8t2_sft dir=runs/tuned data=mine.jsonl --yes
        """
        sizes = {"num_gpus_per_node": laptop_ranks()} if on_laptops else {}
        experts = {"expert_parallelism": laptop_ranks()} if on_laptops and not is_lora(peft_scheme) else {}
        moe = recipe.e8t2_sft(dense=dense, peft_scheme=peft_scheme, **sizes, **experts)
        return run.Partial(
            pipeline,
            dir=dir,
            dense=dense,
            pretrain=fit_laptop(moe) if on_laptops else moe,
            dense_ct=recipe.dense_sft(dense=dense, peft_scheme=peft_scheme, **sizes),
            data=data,
            evaluation=ANSWERS,
        )

    return pipeline_recipe


register()
