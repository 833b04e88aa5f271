"""Recipes that are alike but for their model and its layout, made of the rows of `conf/planning/recipes.yaml`.

Each is a module: `nemo_upcycle.recipes.qwen3_4b_e8t2` has `NAME`, `model`, `trainer`, `pretrain_recipe` and
`pipeline_recipe`, as one of NeMo's recipes. `h100.py` says what the paper's training is, `smollm2_135m_dense_ct.py`
what that of few steps is, `tuning.py` how models are tuned.
"""

import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import lightning.pytorch as pl
import nemo_run as run

from nemo_upcycle.data.blend import DEMO
from nemo_upcycle.pipeline.nemo.pipeline import pipeline
from nemo_upcycle.planning.recipe_table import SPEC, ModelRow, models
from nemo_upcycle.recipes import smollm2_135m_dense_ct, smollm2_135m_e8t2
from nemo_upcycle.recipes.common import change_model, moe_settings
from nemo_upcycle.recipes.h100 import chain, dense_baseline, fast_run, moe_trainer, upcycled_recipe
from nemo_upcycle.recipes.h100_arguments import moe_kernels
from nemo_upcycle.recipes.tuning import tuning_chain, tuning_recipe


_PACKAGE = __name__.rpartition(".")[0]
_NEMO = "nemo.collections.llm.recipes"
Model = Callable[[], run.Config[pl.LightningModule]]


def _add(name: str, doc: str, **members: Any) -> None:
    """Add a recipe as a module of this package, for `from nemo_upcycle.recipes import NAME` and `import ...NAME`."""
    path = f"{_PACKAGE}.{name}"
    module = ModuleType(path, doc)
    module.__spec__ = ModuleSpec(path, None, origin=__file__)
    vars(module).update(members, NAME=name)
    sys.modules[path] = module
    setattr(sys.modules[_PACKAGE], name, module)


def _model(row: ModelRow, name: str, what: str, **fields: Any) -> Model:
    """Register a model that is NeMo's of a row, changed."""
    source = row.nemo if "." in row.nemo else f"{_NEMO}.{row.nemo}"

    def model() -> run.Config[pl.LightningModule]:
        return change_model(importlib.import_module(source).model(), **row.nemo_fields, **fields)

    model.__doc__ = f"""Factory function to create the {what}.

    Returns:
        run.Config[pl.LightningModule]: Configuration of the model.
    """
    registered: Model = run.cli.factory(name=name)(model)
    return registered


def _as_the_paper(row: ModelRow, dense_name: str, name: str, dense_model: Model, doc: str) -> None:
    """Add the dense baseline and the upcycled model, trained as the paper does on H100."""
    nemo = importlib.import_module(f"{_NEMO}.{row.trained_as}")
    runs = row.runs["h100"]
    main, fast, dense, nodes = runs["e8t2"], runs.get("fast", runs["e8t2"]), runs["dense"], runs["e8t2"].gpus // 8
    layout = {
        "tensor_model_parallel_size": dense.tp,
        "pipeline_model_parallel_size": dense.pp,
        "virtual_pipeline_model_parallel_size": dense.vp,
        "context_parallel_size": dense.cp,
        "sequence_parallel": dense.tp > 1,
    }
    baseline = dense_baseline(dense_name, nemo, row.dense, dense_model, layout=layout, num_nodes=nodes)
    _add(
        dense_name,
        f"{row.title}, trained on as a dense model: the baseline that `{name}` has to beat on the same data.",
        model=dense_model,
        trainer=nemo.trainer,
        pretrain_performance_optimizations=nemo.pretrain_performance_optimizations,
        pretrain_recipe=baseline,
    )

    def pretrain_performance_optimizations(recipe: run.Partial) -> run.Partial:
        """Create the fast run: capacity factor 1 with padding, communication overlapped.

        Of Llama 3 8B it is the paper's 46.8 % MFU row, TP1 CP2 ETP1 EP8 PP4 VPP8, reported for 128 H100 in BF16 (462.8
        TFLOP/s a GPU, counting full attention). `recipes/h100.py` says what it shares with NeMo's own
        `performance_mode`, what differs, and why. With `fp8_recipe` it is the FP8 run; NeMo calls its FP8 precision
        untested for convergence, Megatron's MoE guide advises blockwise on H100.

        Args:
            recipe (run.Partial): Recipe of the upcycled model, changed in place.

        Returns:
            run.Partial: Partial configuration for performance-optimized pretraining.
        """
        return fast_run(recipe, tensor_parallelism=fast.tp, context_parallelism=fast.cp)

    fields = moe_settings(SPEC) | moe_kernels(capacity_factor=4.0)
    model = _model(row, name, f"upcycled {row.title} configuration: {row.sizes}", **fields)
    trainer = moe_trainer(
        importlib.import_module(f"{_NEMO}.{row.trainer or row.trained_as}").trainer,
        tensor_parallelism=main.tp,
        pipeline_parallelism=main.pp,
        virtual_pipeline_parallelism=main.vp,
        context_parallelism=main.cp,
    )
    optimize = pretrain_performance_optimizations
    recipe = upcycled_recipe(name, nemo, model, trainer, row.dense, SPEC, optimize, num_nodes=nodes)
    _add(
        name,
        doc,
        SPEC=SPEC,
        model=model,
        trainer=trainer,
        pretrain_performance_optimizations=optimize,
        pretrain_recipe=recipe,
        pipeline_recipe=chain(name, recipe, baseline),
    )


def _few_steps(row: ModelRow, dense_name: str, name: str, dense_model: Model, doc: str) -> None:
    """Add the dense baseline and the upcycled model, trained for a few steps on one GPU, or on none."""
    baseline = smollm2_135m_dense_ct.baseline_recipe(dense_name, row.dense, dense_model)
    title = f"{row.title}, trained on as a dense model: the baseline that `{name}` has to beat on the same data."
    _add(dense_name, title, model=dense_model, trainer=smollm2_135m_dense_ct.trainer, pretrain_recipe=baseline)
    recipe = smollm2_135m_e8t2.upcycled_recipe(name, baseline, row.dense)

    @run.cli.factory(target=pipeline, name=name)
    def pipeline_recipe(dir: str = f"runs/{name}", dense: str = row.dense, processes: int = 1) -> run.Partial:
        """Create the whole chain: import, data, upcycle, pretrain, dense baseline, export, evaluate, report.

        Args:
            dir (str): Folder of the run.
            dense (str): The dense checkpoint to start from: a folder or `hf://ORG/NAME`.
            processes (int): Ranks of the two training stages; the experts are spread over them.

        Returns:
            run.Partial: Partial configuration of the pipeline.

        Examples:
            CLI usage:
                $ nemo upcycle pipeline --factory NAME dir=runs/first --yes
        """
        return run.Partial(
            pipeline,
            dir=dir,
            dense=dense,
            pretrain=recipe(num_gpus_per_node=processes, expert_parallelism=processes, dense=dense),
            dense_ct=baseline(num_gpus_per_node=processes, dense=dense),
            data=DEMO,
        )

    model = _model(row, name, f"upcycled {row.title} configuration: {row.sizes}", **moe_settings(SPEC))
    trainer = smollm2_135m_e8t2.trainer
    _add(name, doc, SPEC=SPEC, model=model, trainer=trainer, pretrain_recipe=recipe, pipeline_recipe=pipeline_recipe)


def _tuned(row: ModelRow, tuning: dict[str, Any]) -> None:
    """Add the tunings of the dense baseline and of the upcycled model, on conversations."""
    base, name = (f"{row.name}_{kind}_sft" for kind in ("dense", "e8t2"))
    dense, upcycled = (getattr(sys.modules[_PACKAGE], f"{row.name}_{kind}") for kind in ("dense_ct", "e8t2"))
    baseline = tuning_recipe(base, dense.pretrain_recipe, **tuning)
    _add(base, f"{row.title}, tuned as a dense model: what `{name}` is compared with.", finetune_recipe=baseline)
    recipe = tuning_recipe(name, upcycled.pretrain_recipe, **tuning)
    sizes = getattr(upcycled, "TUNED", {})
    if "num_gpus_per_node" in tuning:
        sizes = {one: tuning[one] for one in ("num_nodes", "num_gpus_per_node")} | {"expert_parallelism": 1}
    _add(
        name,
        f"{row.title} upcycled to 8 experts, top-2, and tuned on conversations.",
        finetune_recipe=recipe,
        pipeline_recipe=tuning_chain(name, recipe, baseline, **sizes),
    )


for _row in (row for row in models().values() if "nemo" in row.trainers):
    if _row.nemo:
        _names = f"{_row.name}_dense_ct", f"{_row.name}_e8t2"
        _dense = _model(_row, _names[0], f"{_row.title} configuration")
        (_few_steps if _row.few_steps else _as_the_paper)(
            _row, *_names, _dense, f"{_row.title} upcycled to 8 experts, top-2: {_row.sizes}."
        )
    if _row.tuning:
        _tuned(_row, _row.tuning)
