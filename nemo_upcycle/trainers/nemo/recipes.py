"""Serialise recipes for the stages of a run, compare recipes, and point them to a run's folders."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo_upcycle.errors import SpecError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.megatron_config import router_fields
from nemo_upcycle.trainers.nemo.imports import quiet_imports


#: Parts of a recipe whose settings a run derives from its folder, its parent and its data.
PLACED_PARTS = ("log", "resume", "data")
#: Maps a part of a recipe to the reason why the part's settings have no effect, and to the fix.
_DECIDES = {
    "log": ("the run's folder decides it", "omit it, or change dir"),
    "resume": ("the run's folder and its parent decide it", "omit it, or change dir or dense"),
    "data": ("the run's data and parent decide it", "omit it, or change data=... or dense=..."),
}
#: Settings that NeMo ignores if NeMo is given the folder, or that would hide a stage's own checkpoints from the stage.
_OF_THE_RUN = (
    *("log.version", "log.use_datetime_version", "log.ckpt.dirpath"),
    *("resume.resume_from_directory", "resume.resume_from_path", "resume.resume_if_exists"),
)


def dump_recipe(recipe: run.Partial) -> str:
    """Return a recipe as text; the same recipe always gives the same text."""
    return ZlibJSONSerializer().serialize(recipe)


def load_recipe(text: str) -> run.Partial:
    """Return the recipe that `dump_recipe` turned into text."""
    with quiet_imports():  # a stage's own process has not imported NeMo yet
        return ZlibJSONSerializer().deserialize(text)


def every_setting(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and the YAML value of every setting of a configuration, in the order of its arguments."""
    if isinstance(value, fdl.Buildable):
        target = value.__fn_or_cls__
        yield f"{path}.is" if path else "is", f"{target.__module__}.{target.__qualname__}"
        for name, inner in value.__arguments__.items():
            yield from every_setting(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, fdl.Buildable) for item in value):
        for number, item in enumerate(value):
            yield from every_setting(item, f"{path}.{number}")
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return str(list(value) if isinstance(value, tuple) else value)


def recipe_spec(recipe: run.Partial) -> Any:
    """Build and return the upcycling spec of a recipe; this also checks the spec."""
    try:
        return fdl.build(recipe.resume.restore_config.spec)
    except SpecError as error:  # fiddle wraps the error and adds the whole configuration to its text
        raise getattr(error, "proxy_base_exception", error) from None


def model_config(recipe: run.Partial, parent: Architecture | None = None) -> Any:
    """Build the NeMo model config of an upcycling recipe, or of its parent, and return it.

    Args:
        recipe: recipe of the upcycled model.
        parent: architecture of the parent, to get the parent's config; None: the upcycled model's config.
    """
    config = copy.deepcopy(recipe.model.config)
    if parent:
        for name, value in (router_fields(parent) or {"num_moe_experts": None}).items():
            setattr(config, name, value)
    return fdl.build(config)


def place_recipe(recipe: run.Partial, folder: Path, dense_folder: Path, data_folder: Path) -> None:
    """Point a recipe to a run's folders, in place.

    Args:
        recipe: recipe of a training stage.
        folder: folder for logs and checkpoints.
        dense_folder: the dense parent.
        data_folder: finished folder of `nemo-upcycle data`.
    """
    recipe.log.explicit_log_dir = str(folder)
    recipe.log.log_dir = None
    recipe.resume.restore_config.path = str(dense_folder)
    train_on(recipe, data_folder, str(dense_folder))


def placed_settings(recipe: run.Partial) -> list[str]:
    """List a recipe's settings that a run would replace, or that would hide a stage's checkpoints from the stage."""
    placed = copy.deepcopy(recipe)
    place_recipe(placed, Path("STAGE"), Path("DENSE"), Path("DATA"))
    given, after = dict(every_setting(recipe)), dict(every_setting(placed))
    return [name for name, value in given.items() if name in _OF_THE_RUN or after.get(name) != value]


def ignored_settings(recipe: run.Partial, usual: run.Partial, where: str = "") -> Iterator[UpcycleError]:
    """Yield an error for every setting that a user has changed and that a run would replace or ignore.

    Args:
        recipe: recipe with the user's settings.
        usual: the same recipe without the user's settings of `PLACED_PARTS`.
        where: prefix of the recipe's overrides, for error messages.
    """
    given, before = dict(every_setting(recipe)), dict(every_setting(usual))
    for name in placed_settings(recipe):
        if given[name] != before.get(name):
            expected, fix = _DECIDES[name.partition(".")[0]]
            setting = f"{where}{name.removesuffix('.is')}"
            yield UpcycleError(setting, kind="refused", got=f"cannot be set: {expected}", fix=fix)


def train_on(recipe: run.Partial, data_folder: str | Path, dense: str) -> None:
    """Let a recipe train on a finished folder of `nemo-upcycle data`, in place, and keep its batch sizes.

    Args:
        recipe: recipe of a training; a recipe that fine-tunes needs a folder of `nemo-upcycle chat` instead.
        data_folder: the finished folder.
        dense: the dense model, whose tokenizer must have made the data.
    """
    from nemo_upcycle.data.blend_module import blend_data
    from nemo_upcycle.data.chat_module import chat_data

    if recipe.data.__fn_or_cls__ is chat_data:
        recipe.data.dense, recipe.data.folder = dense, str(data_folder)
        return
    kept = ("seq_length", "micro_batch_size", "global_batch_size", "num_workers", "seed", "indices", "skip_samples")
    given = {name: value for name in kept if (value := getattr(recipe.data, name, None)) is not None}
    if recipe.data.__fn_or_cls__ is not blend_data:  # the seed of NeMo's mock data has no meaning here
        given.pop("seed", None)
    recipe.data = run.Config(blend_data, dense=dense, folder=str(data_folder), **given)
