"""The training of a Bridge recipe: find the recipe, complete it, point it to a run's folders, and run it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.training.config import ConfigContainer
from omegaconf.errors import OmegaConfBaseException

from nemo_upcycle.data.chat.finished import open_chat
from nemo_upcycle.data.finished import open_blend
from nemo_upcycle.errors import UpcycleError, mistake_in_file
from nemo_upcycle.planning.recipe_table import job_of
from nemo_upcycle.trainers.bridge.blend import BlendDataset
from nemo_upcycle.trainers.bridge.chat import ChatDataset
from nemo_upcycle.trainers.bridge.node import UpcyclingConfig
from nemo_upcycle.trainers.bridge.recipes.common import with_parent
from nemo_upcycle.trainers.bridge.upcycling import follow_node
from nemo_upcycle.trainers.facts import Evaluations
from nemo_upcycle.trainers.settings import setting
from nemo_upcycle.utils.children import shield_children


#: Names in the stage's folder: the folder of a run's checkpoints, and the file with Bridge's output.
CHECKPOINTS, LOG = "checkpoints", "bridge.log"
#: Module in which a recipe's name is looked up if the name has no module. A plan stores recipes by name.
_RECIPES = "nemo_upcycle.recipes"
#: Settings that follow from the folders of the stage and of the data.
_PLACED = ("checkpoint.save", "checkpoint.load", "dataset.folder", "logger.tensorboard_dir")


def find_recipe(name: str) -> Callable[..., ConfigContainer]:
    """Return one of this package's recipes, or a user's recipe.

    Args:
        name: name of the function (a value of `run_recipe.py --recipe`), or `package.module:function`, which is also
            looked up in the current folder.

    Raises:
        UpcycleError: the recipe does not exist (the text names this package's closest match), or it requires arguments
            other than `dense`.
    """
    if ":" not in name:
        recipes = importlib.import_module(_RECIPES).bridge_functions()
        if name not in recipes:
            raise UpcycleError.unknown("recipe", name, recipes)
        return recipes[name]
    module, _, function = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path:  # a console script does not search the current folder
        sys.path.insert(0, here)
    try:
        found: Any = getattr(importlib.import_module(module), function)
        takes = {"dense": ""} if takes_dense(found) else {}
        inspect.signature(found).bind(**takes)
    except UpcycleError:
        raise
    except Exception as error:
        raise mistake_in_file(error) or UpcycleError(
            field="recipe",
            kind="state",
            got=f"{name} cannot be called ({error})",
            fix="give a function that requires no argument except `dense`, and set PYTHONPATH to its folder",
        ) from None
    return found


def load_config(
    recipe: str, settings: Sequence[str], dense: Path, changes: Mapping[str, Any] | None
) -> UpcyclingConfig:
    """Return the configuration of a recipe that starts from a dense checkpoint.

    Args:
        recipe: see `find_recipe`.
        settings: overrides `KEY=VALUE`, as Bridge's command line takes them.
        dense: dense checkpoint that replaces the recipe's own checkpoint.
        changes: fields of the node `upcycling` that are to differ; None: train the parent itself with the recipe.

    Raises:
        UpcycleError: the recipe does not exist, the recipe starts from no dense checkpoint or from several, or a
            setting does not exist or has an invalid value.
    """
    config = _made(recipe, dense)
    parents = getattr(config, "parents", ())
    if len(parents) != 1:
        raise UpcycleError(
            f"Recipe {recipe}",
            kind="refused",
            got=f"has {len(parents)} parents ({', '.join(parents)})" if parents else "starts from random weights",
            expected="the pipeline needs one dense checkpoint",
            fix=(
                "train the model with a script that calls pretrain(config, forward_step)"
                if parents
                else "make the recipe with with_upcycling"
            ),
        )
    if changes is None:
        config = with_parent(config, dense)
    elif (node := config.upcycling) is None:
        if changes:
            raise UpcycleError(
                f"Recipe {recipe}",
                kind="refused",
                got="does not upcycle, so it has no settings of upcycling",
                fix="omit the settings of upcycling",
            )
        config.hf_model_path = str(dense)
    else:
        node.hf_model_path = str(dense)
        node.change(replace(node.spec, **changes))
    follow_node(config)
    is_chat = isinstance(data := config.dataset, ChatDataset)
    if is_chat != tunes(recipe):
        raise UpcycleError(
            f"Recipe {recipe}",
            kind="refused",
            got=(
                f"has a {type(data).__name__}: @on_gpus(tunes=True) needs conversations (a ChatDataset), and "
                "other recipes need texts"
            ),
            fix="make recipe and data agree",
        )
    data_class: Any = ChatDataset if is_chat else BlendDataset
    config.dataset = data_class(  # before the settings, because they may change the data
        folder="", seq_length=data.seq_length, num_workers=data.num_workers, pin_memory=torch.cuda.is_available()
    )
    for typed in settings:
        _change(config, typed)
    return config


def _made(recipe: str, dense: Path) -> Any:
    """Call a recipe, with the dense checkpoint if the recipe has the argument `dense`."""
    make = find_recipe(recipe)
    try:
        return make(dense=str(dense)) if takes_dense(make) else make()
    except Exception as error:
        if mistake := mistake_in_file(error):
            raise mistake from None
        raise


def tunes(recipe: str) -> bool:
    """Return whether a recipe trains on conversations, as `on_gpus` states or, without this, as the data show."""
    make = find_recipe(recipe)
    if (said := job_of(make).tunes) is not None:
        return said
    return not takes_dense(make) and isinstance(make().dataset, ChatDataset)


def takes_dense(recipe: Callable[..., Any]) -> bool:
    """Return whether a recipe has the argument `dense`, for its parent."""
    return "dense" in inspect.signature(recipe).parameters


def _change(config: ConfigContainer, typed: str) -> None:
    """Apply one override to a configuration, in place."""
    from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

    key = typed.partition("=")[0].lstrip("+~")
    before, placed = setting(config, key), [setting(config, name) for name in _PLACED]
    try:
        process_config_with_overrides(config, cli_overrides=[typed])
    except (OverridesError, OmegaConfBaseException, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise UpcycleError(f"{typed}: {reason}.") from None
    after = setting(config, key)
    if isinstance(before, int | float) and isinstance(after, str):  # Bridge checks no types
        raise UpcycleError(key, got=f"'{after}'", expected="a number, true or false", fix="correct the value")
    for name, value in zip(_PLACED, placed, strict=True):
        now = setting(config, name)
        is_off = now is None and name == "logger.tensorboard_dir"
        if now != value and not is_off:
            expected = "cannot be set, because the run's folder decides it"
            raise UpcycleError(name, kind="refused", got=expected, fix="omit it, or change dir")


def place_config(config: ConfigContainer, folder: Path, data_folder: Path) -> None:
    """Point a configuration to a run's folders, in place.

    Args:
        config: result of `load_config`.
        folder: folder of the stage, for checkpoints and logs.
        data_folder: a finished folder of `nemo-upcycle data`, or of `nemo-upcycle chat`.

    Raises:
        UpcycleError: the data folder is not finished.
    """
    if isinstance(config.dataset, ChatDataset):
        chat = open_chat(data_folder)
        config.dataset.folder, packs = str(chat.folder), chat.manifest["splits"]["validation"]["packs"]
        all_packs = -(-packs // config.train.global_batch_size)
        config.validation.eval_iters = min(config.validation.eval_iters, all_packs)
    else:
        config.dataset.folder = str(open_blend(data_folder).folder)
    config.checkpoint.save = config.checkpoint.load = str(folder / CHECKPOINTS)
    if config.logger.tensorboard_dir:  # null turns TensorBoard off
        config.logger.tensorboard_dir = str(folder / "tb_logs")
    if torch.cuda.is_available():  # on a CPU a signal ends the run at once, because steps take long
        config.train.exit_signal_handler = True


def run_config(
    config: ConfigContainer, folder: Path, *, evaluations: Evaluations | None = None, verbose: bool = False
) -> bool:
    """Run the training of a configuration on this rank, with this package's callbacks.

    Args:
        config: configuration that `place_config` has changed.
        folder: folder of the stage.
        evaluations: evaluations during training; None: the configuration's evaluations.
        verbose: whether Bridge prints to the console instead of to `bridge.log`.

    Returns:
        Whether the training ended by itself; False if a signal stopped it and a checkpoint is saved.
    """
    from megatron.bridge.training.gpt_step import forward_step
    from megatron.bridge.training.pretrain import pretrain

    from nemo_upcycle.trainers.bridge.callbacks import upcycle_callbacks

    folder.mkdir(parents=True, exist_ok=True)
    if config.train.exit_signal_handler:
        shield_children()
    if not verbose:  # `pretrain` prints the traceback of every exception, even of SystemExit
        logging.getLogger(pretrain.__module__).disabled = True
    try:
        with contextlib.nullcontext() if verbose else _printed_to(folder / LOG):
            pretrain(config, forward_step, callbacks=upcycle_callbacks(config, folder, evaluations))
    except SystemExit:
        return False
    return True


@contextlib.contextmanager
def _printed_to(log: Path) -> Iterator[None]:
    """Append Bridge's output to a file, which stays readable because Bridge's ranks do not print at the same time."""
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield
