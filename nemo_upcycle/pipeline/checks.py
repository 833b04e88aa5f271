"""Check the arguments of a run before anything is written, fetched or launched."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nemo_run as run

from nemo_upcycle.data.blend import read_blend
from nemo_upcycle.data.build import check_files
from nemo_upcycle.data.dense import check_address, local_parent, read_parent
from nemo_upcycle.data.environment import data_python, engine_version
from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.data.inputs import require_disjoint
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.evaluation.suite_config import read_suite_config
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.pipeline.markers import StageFolder, setting_texts
from nemo_upcycle.pipeline.plan import Plan, RunPlan, Stage
from nemo_upcycle.pipeline.plans import kind_of
from nemo_upcycle.pipeline.recipes_io import check_recipe, ranks_of
from nemo_upcycle.training.values import setting
from nemo_upcycle.utils.files import resolved


#: Sizes of a dense model, and where a recipe sets them.
_SIZES = {
    "num_layers": "num_layers",
    "hidden_size": "hidden_size",
    "ffn_size": "ffn_hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "qk_norm": "qk_layernorm",
}


def is_local(executor: Any) -> bool:
    """Return whether the stages run on this machine."""
    return executor is None or isinstance(executor, run.LocalExecutor)


def check_arguments(
    run_dir: Path,
    plan: RunPlan,
    recipes: Mapping[str, run.Partial],
    ctx: Any,
    stages: Sequence[Stage],
    *,
    shown: bool = False,
) -> None:
    """Check every argument of the pipeline.

    Args:
        run_dir: the run's folder.
        plan: what the stages will be given.
        recipes: of the upcycled model and of the dense baseline, if there is one, by stage.
        ctx: NeMo-Run's context of the command.
        stages: those that will run.
        shown: whether nothing starts, so that neither the network nor this machine has to have what a run needs.

    Raises:
        UpcycleError: one is not valid; the text names it.
    """
    check_folder(run_dir)
    parent = check_address(plan.dense)
    check_blend(plan.data, remote=not shown)
    read_suite_config(plan.evaluation)
    is_here = is_local(ctx.executor) and not shown
    if is_here:
        check_here(plan, stages, recipes)
    for name, recipe in recipes.items():
        if not setting(recipe, "resume.restore_config.path"):
            raise UpcycleError(
                f"{name}.resume.restore_config",
                got="none",
                expected="a dense checkpoint to start from",
                fix="make the recipe with upcycled(...), a baseline's with start_from(recipe, dense, None): README",
            )
        check_recipe(recipe, f"{name}.")
    if not recipes["pretrain"].resume.restore_config.spec:
        raise UpcycleError(
            "pretrain.resume.restore_config.spec",
            got="none",
            expected="an UpcycleSpec",
            fix="give the recipe of an upcycled model: nemo_upcycle.recipes.upcycled(recipe, dense, spec) makes one",
        )
    check_detach(ctx)
    check_started(run_dir, plan)
    imports = any(stage.name == "import" for stage in stages) and not StageFolder(run_dir, "import").marker.is_file()
    if parent := parent or _parent(plan.dense, remote=is_here and imports):
        for name, recipe in recipes.items():
            _check_parent(recipe, parent, plan.dense, f"{name}.")


def check_detach(ctx: Any) -> None:
    """Check that a run which shall go on without the launcher can.

    Raises:
        UpcycleError: its executor needs the launcher.
    """
    if ctx.detach and not isinstance(ctx.executor, run.SlurmExecutor):
        raise UpcycleError(
            "--detach",
            got="an executor that needs the launcher",
            expected="Slurm",
            fix="leave it out, and start the command inside tmux or with nohup",
        )


def check_started(run_dir: Path, plan: Plan) -> None:
    """Check now, and not after hours of other stages, that what a folder holds was started from the same inputs.

    Raises:
        UpcycleError: a marker is damaged, a resumable stage was started from others, or the folder is of another kind
            of run.
    """
    if (kind := kind_of(run_dir)) and not isinstance(plan, kind):
        raise UpcycleError(
            f"dir {run_dir}", got=kind.kind, expected=f"{plan.kind}, or a new folder", fix="choose another"
        )
    for stage in plan.stages:
        folder = stage.folder(run_dir)
        if folder.marker.is_file():
            folder.outputs()
        if stage.resumable:
            folder.require_same(setting_texts(stage.settings_of(plan)))


def check_blend(data: str, *, remote: bool) -> None:
    """Check what a run is trained on: a finished folder, or a blend and its files.

    Args:
        data: the argument of the pipeline.
        remote: whether to ask for files behind addresses, too, which needs the network.
    """
    if Path(data).is_dir():
        open_blend(data)
        return
    blend = read_blend(data)
    listed = {
        name: check_files(blend, name)
        for name, source in blend.config.sources.items()
        if remote or not any("://" in entry for entry in (*source.train, *source.validation, *source.heldout))
    }
    require_disjoint(listed)
    for suite in blend.config.decontaminate:
        read_suite_config(suite)


def check_engine(plan: RunPlan, stages: Sequence[Stage]) -> None:
    """Check that this machine has what builds the run's blend, if one of the stages does.

    Raises:
        UpcycleError: it does not.
    """
    if plan.blend and any(stage.name == "data" for stage in stages):
        engine_version(data_python())


def check_folder(run_dir: Path) -> None:
    """Check that a run can be written there."""
    existing = next(path for path in (resolved(run_dir), *resolved(run_dir).parents) if path.exists())
    if not existing.is_dir():
        raise UpcycleError(
            f"dir {run_dir}", got=f"{existing} is a file", expected="a folder", fix="choose another dir"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UpcycleError(
            f"dir {run_dir}",
            got=f"{existing} is not writable",
            expected="a writable folder",
            fix="choose another dir, or change who may write there",
        )


def _parent(source: str, *, remote: bool) -> Architecture | None:
    """Return a parent's architecture; None for an asset, and for a name on the hub that is not to be asked for."""
    return local_parent(source) or (read_parent(source) if remote and not source.startswith("asset://") else None)


def check_parents(recipe: run.Partial, *, remote: bool) -> None:
    """Check that a recipe's model has the sizes of the dense models that it starts from.

    Args:
        recipe: of a training job that starts on this machine.
        remote: whether to ask for a model on the hub, too, which needs the network.

    Raises:
        UpcycleError: one is not there, cannot be reached, is no such model, or is of other sizes.
    """
    restore = recipe.resume.restore_config
    for source in (restore.path, *(restore.branches or [])):
        if parent := _parent(source, remote=remote):
            _check_parent(recipe, parent, source, "")


def _check_parent(recipe: run.Partial, parent: Architecture, dense: str, where: str) -> None:
    """Check that a recipe's model has the sizes of the dense model that it starts from."""
    model = architecture_of(recipe.model.config, parent.vocab_size)
    for name, field in _SIZES.items():
        got, expected = getattr(model, name), getattr(parent, name)
        if got != expected:
            raise UpcycleError(
                f"{where}model.config.{field}",
                got=got,
                expected=f"{expected}, as {dense} has",
                fix="give the recipe of a model of this family and size, or another dense",
            )


def check_here(plan: RunPlan, stages: Sequence[Stage], recipes: Mapping[str, run.Partial]) -> None:
    """Check what stages ask of this machine, where they run on it; a forecast needs none of it.

    Args:
        plan: what the stages will be given.
        stages: those that will run.
        recipes: of the trainings, by stage.

    Raises:
        UpcycleError: this machine does not have it.
    """
    check_engine(plan, stages)
    for name in (stage.name for stage in stages if stage.name in recipes):
        if (nodes := ranks_of(recipes[name], f"{name}.")[0]) > 1:
            raise UpcycleError(
                f"{name}.trainer.num_nodes",
                got=nodes,
                expected="1 on this machine",
                fix="set it to 1, or name the cluster with run.executor=NAME",
            )
        check_kernels(recipes[name], f"{name}.")


def check_kernels(recipe: run.Partial, where: str = "") -> None:
    """Check that the kernels which a recipe's model asks for are installed, where the training runs.

    Raises:
        UpcycleError: they are not.
    """
    from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb

    if getattr(recipe.model.config, "apply_rope_fusion", False) and fused_apply_rotary_pos_emb is None:
        raise UpcycleError(
            "Transformer Engine",
            got="not installed",
            expected=f"it, for the kernels of {where}model.config (apply_rope_fusion)",
            fix=(
                "train in NVIDIA's NeMo container, which holds it; without a GPU, "
                f"{where}model.config.apply_rope_fusion=False"
            ),
        )


def check_data(recipe: run.Partial) -> None:
    """Check the data folder of a recipe, where it trains on one: its files, its tokenizer, the length of the run.

    The tokenizer of a dense model that is still to be fetched is compared when the run starts.

    Raises:
        UpcycleError: the folder is not finished, damaged or of another tokenizer, or has too little text for the run.
    """
    from nemo_upcycle.data.blend_module import blend_data
    from nemo_upcycle.data.blend_samples import require_samples

    data = recipe.data
    if data.__fn_or_cls__ is not blend_data or data.folder is None:
        return
    blend = open_blend(data.folder)
    blend.paths(data.seq_length)
    samples = blend.num_train_samples(data.seq_length, data.run_tokens)
    if Path(data.dense.removeprefix("nemo://")).is_dir():
        blend.require_tokenizer_of(data.dense)
    require_samples(recipe.trainer.max_steps, data.global_batch_size, data.seq_length, samples)
