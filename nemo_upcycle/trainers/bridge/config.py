"""A training of a recipe by Bridge's naming: found, completed, pointed to a run's folders, and run."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.config import ConfigContainer
from megatron.training.models.base import ModelConfig
from omegaconf.errors import OmegaConfBaseException

from nemo_upcycle.data.chat.finished import open_chat
from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.errors import UpcycleError, mistake_in_file
from nemo_upcycle.sources.resolve import open_dense
from nemo_upcycle.sources.same_parent import parent_digest
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.base import Evaluations
from nemo_upcycle.trainers.bridge import tunes
from nemo_upcycle.trainers.bridge.blend import BlendDataset
from nemo_upcycle.trainers.bridge.chat import ChatDataset
from nemo_upcycle.trainers.bridge.recipes.common import made_for
from nemo_upcycle.trainers.bridge.upcycling import UpcycleHook, hook_of
from nemo_upcycle.trainers.settings import setting
from nemo_upcycle.utils.children import shield_children


#: Where a run's checkpoints go, and what Bridge prints; as a run's stage names them.
CHECKPOINTS, LOG = "checkpoints", "bridge.log"
#: Where a name without a module is looked for; a plan holds names.
_RECIPES = "nemo_upcycle.recipes"
#: Settings that follow from the folder of the stage, and of the data.
_PLACED = ("checkpoint.save", "checkpoint.load", "dataset.folder", "logger.tensorboard_dir")


def find_recipe(name: str) -> Callable[[], ConfigContainer]:
    """Return a recipe of this package's, or of a user's.

    Args:
        name: name of the function, a value of `run_recipe.py --recipe`; or `package.module:function`, which is looked
            for in the present folder, too.

    Raises:
        UpcycleError: there is none, and the text has this package's closest match; or it takes arguments.
    """
    if ":" not in name:
        recipes = importlib.import_module(_RECIPES).bridge_functions()
        if name not in recipes:
            raise UpcycleError.unknown("recipe", name, recipes)
        return recipes[name]
    module, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # a console script does not look there
        sys.path.insert(0, here)
    try:
        found: Any = getattr(importlib.import_module(module), function)
        inspect.signature(found).bind()
    except UpcycleError:
        raise
    except Exception as error:
        raise mistake_in_file(error) or UpcycleError(
            "recipe",
            got=name,
            expected=f"a function without arguments that can be imported ({error})",
            fix="check the name, and that PYTHONPATH has its folder",
        ) from None
    return found


def load_config(
    recipe: str, settings: Sequence[str], dense: Path, changes: Mapping[str, Any] | None
) -> ConfigContainer:
    """Return the configuration of a recipe that starts from a dense checkpoint.

    Args:
        recipe: see `find_recipe`.
        settings: `KEY=VALUE`, as Bridge's command line takes them.
        dense: the dense checkpoint, in the place of the recipe's own.
        changes: fields of the recipe's spec that are to differ; None: the recipe's dense baseline, without a spec.

    Raises:
        UpcycleError: there is no such recipe, it upcycles nothing, or another checkpoint, or a setting does not exist
            or takes no such value.
    """
    make = find_recipe(recipe)
    with made_for(dense, changes):  # Bridge's recipes have no arguments
        try:
            config = make()
        except Exception as error:
            if mistake := mistake_in_file(error):
                raise mistake from None
            raise
    if hook_of(config) is None:
        raise UpcycleError(
            f"recipe {recipe}",
            got="one that starts from random weights",
            expected="upcycle_on_start in it",
            fix="take one of this package's, or call upcycle_on_start(config, dense, spec) in yours",
        )
    _check_parents(recipe, required_hook(config).paths, dense)
    _check_spec(recipe, required_hook(config).spec, changes)
    if isinstance(config.model, ModelConfig):
        raise UpcycleError(
            f"recipe {recipe}",
            got=type(config.model).__name__,
            expected="a provider",
            fix="make it by upcycled_provider",
        )
    if changes is None and not config.model.num_moe_experts:  # a parent may have experts of its own
        _forget_experts(config)
    data_class: Any = ChatDataset if tunes(recipe) else BlendDataset
    data = config.dataset
    if isinstance(data, ChatDataset) != tunes(recipe):
        raise UpcycleError(
            f"recipe {recipe}",
            got=f"a {type(data).__name__}",
            expected="a ChatDataset, by its name's `sft`" if tunes(recipe) else "`sft` in the name of one that tunes",
            fix="change the data of the recipe, or its name",
        )
    config.dataset = data_class(  # before the settings, which may be the data's
        folder="", seq_length=data.seq_length, num_workers=data.num_workers, pin_memory=torch.cuda.is_available()
    )
    for typed in settings:
        _change(config, typed)
    return config


def _check_spec(recipe: str, spec: UpcycleSpec | None, changes: Mapping[str, Any] | None) -> None:
    """Check that a recipe's spec is what `load_config` asked for."""
    if changes is None and spec is not None:
        raise UpcycleError(
            "dense_ct",
            got=recipe,
            expected="a baseline's recipe, or one whose spec upcycled or upcycled_pretraining takes",
            fix="name another one",
        )
    if changes and (spec is None or replace(spec, **changes) != spec):
        raise UpcycleError(
            f"recipe {recipe}",
            got=f"no spec that takes {dict(changes)}",
            expected="one made by upcycled_pretraining",
            fix="omit the changes, or make the recipe's configuration by that",
        )


def _forget_experts(config: ConfigContainer) -> None:
    """Set back what a recipe sets of its experts after its model is made, in place."""
    model, overlap = config.model, config.comm_overlap
    for field in fields(model):
        if field.name.startswith(("moe_", "expert_")) and field.default is not MISSING:
            setattr(model, field.name, field.default)
    if pattern := getattr(model, "hybrid_layer_pattern", None):
        model.hybrid_layer_pattern = pattern.replace("E", "-")  # networks
    if modules := model.recompute_modules:
        model.recompute_modules = [
            name for name in modules if name not in ("moe", "moe_act", "shared_experts")
        ] or None
    if overlap is not None:
        overlap.overlap_moe_expert_parallel_comm = False


def _check_parents(recipe: str, paths: Sequence[Path], dense: Path) -> None:
    """Check that a recipe starts from the checkpoint that a run imports, asks for step 0 and reports about."""
    parents = ", ".join(map(str, paths))
    if len(paths) > 1:
        raise UpcycleError(
            f"recipe {recipe}",
            got=f"{len(paths)} parents: {parents}",
            expected="one, which the stages around the training are about",
            fix="train it by a script: pretrain(config, forward_step)",
        )
    if not _is_same_model(paths[0], dense):
        raise UpcycleError(
            "dense",
            got=str(dense),
            expected=f"{parents}, which recipe {recipe} starts from",
            fix=f"give dense={parents}, or make the recipe by upcycled_pretraining, which takes the one that is given",
        )


def _is_same_model(one: Path, other: Path) -> bool:
    """Return whether two folders are one, or hold the same weights, as an asset's in the cache and in a run do."""
    if one.resolve() == other.resolve():
        return True
    try:
        with open_dense(one) as ours, open_dense(other) as theirs:
            return ours.architecture == theirs.architecture and parent_digest(ours) == parent_digest(theirs)
    except UpcycleError:  # of one of them the configuration alone is here
        return False


def _change(config: ConfigContainer, typed: str) -> None:
    """Change a configuration by one setting, in place."""
    from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

    key = typed.partition("=")[0].lstrip("+~")
    before, placed = setting(config, key), [setting(config, name) for name in _PLACED]
    try:
        process_config_with_overrides(config, cli_overrides=[typed])
    except (OverridesError, OmegaConfBaseException, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UpcycleError(f"{typed}: {reason}.") from None
    after = setting(config, key)
    if isinstance(before, int | float) and isinstance(after, str):  # Bridge looks at no type
        raise UpcycleError(key, got=f"'{after}'", expected="a number, or true or false", fix="give one")
    for name, value in zip(_PLACED, placed, strict=True):
        now = setting(config, name)
        is_off = now is None and name == "logger.tensorboard_dir"
        if now != value and not is_off:
            expected = "no such setting: the run's folder decides"
            raise UpcycleError(name, got=typed, expected=expected, fix="omit it, or change dir")


def required_hook(config: ConfigContainer) -> UpcycleHook:
    """Return the hook that upcycles, from a configuration of `load_config`."""
    hook = hook_of(config)
    assert hook is not None
    return hook


def place_config(config: ConfigContainer, folder: Path, data_folder: Path) -> None:
    """Point a configuration to a run's folders, in place.

    Args:
        config: result of `load_config`.
        folder: folder of the stage, for checkpoints and logs.
        data_folder: a finished folder of `nemo-upcycle data`, or of `nemo-upcycle chat`.

    Raises:
        UpcycleError: the folder is not finished.
    """
    if isinstance(config.dataset, ChatDataset):
        chat = open_chat(data_folder)
        config.dataset.folder, packs = str(chat.folder), chat.manifest["splits"]["validation"]["packs"]
        all_packs = -(-packs // config.train.global_batch_size)
        config.validation.eval_iters = min(config.validation.eval_iters, all_packs)
    else:
        config.dataset.folder = str(open_blend(data_folder).folder)
    config.checkpoint.save = config.checkpoint.load = str(folder / CHECKPOINTS)
    if config.logger.tensorboard_dir:  # null: nowhere
        config.logger.tensorboard_dir = str(folder / "tb_logs")
    if torch.cuda.is_available():  # without, a step takes longer than anyone waits: it ends at once
        config.train.exit_signal_handler = True


def run_config(
    config: ConfigContainer, folder: Path, *, evaluations: Evaluations | None = None, verbose: bool = False
) -> bool:
    """Train as a configuration says, on this rank, with this package's callbacks.

    Args:
        config: configuration that `place_config` has changed.
        folder: folder of the stage.
        evaluations: evaluations during training; None takes the configuration's.
        verbose: whether Bridge prints to the console rather than to `bridge.log`.

    Returns:
        Whether it ended by itself; False if a signal stopped it and it has saved.
    """
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from nemo_upcycle.trainers.bridge.callbacks import upcycle_callbacks

    folder.mkdir(parents=True, exist_ok=True)
    if config.train.exit_signal_handler:
        shield_children()
    if not verbose:  # it prints the traceback of whatever it raises, SystemExit too
        logging.getLogger(pretrain.__module__).disabled = True
    try:
        with contextlib.nullcontext() if verbose else _printed_to(folder / LOG):
            pretrain(config, forward_step, callbacks=upcycle_callbacks(config, folder, evaluations))
    except SystemExit:
        return False
    return True


@contextlib.contextmanager
def _printed_to(log: Path) -> Iterator[None]:
    """Append what Bridge prints to a file; ranks print one at a time, or the first and the last alone."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield
