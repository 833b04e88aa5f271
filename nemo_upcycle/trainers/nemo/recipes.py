"""Recipes between the launcher and the stages: serialised by NeMo-Run, checked, and pointed to a run's folder."""

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


#: Parts of a recipe with settings that follow from the run's folder, its parent and its data.
PLACED_PARTS = ("log", "resume", "data")
#: What decides in the place of such a setting, and what to do instead of giving it.
_DECIDES = {
    "log": ("the run's folder decides it", "omit it, or change dir"),
    "resume": ("the run's folder and its parent decide it", "omit it, or change dir or dense"),
    "data": ("the run's data and parent decide it", "omit it, or change data=... or dense=..."),
}
#: Settings that NeMo ignores where it is told the folder, or with which a stage would not find its own checkpoints.
_OF_THE_RUN = (
    *("log.version", "log.use_datetime_version", "log.ckpt.dirpath"),
    *("resume.resume_from_directory", "resume.resume_from_path", "resume.resume_if_exists"),
)


def dump_recipe(recipe: run.Partial) -> str:
    """Return a recipe as text. The same recipe gives the same text."""
    return ZlibJSONSerializer().serialize(recipe)


def load_recipe(text: str) -> run.Partial:
    """Return the recipe of a text from `dump_recipe`."""
    with quiet_imports():  # a stage's own process has not imported NeMo yet
        return ZlibJSONSerializer().deserialize(text)


def every_setting(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting of a configuration as its path and its value in YAML, in the order of its arguments."""
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
    """Return the upcycling spec of a recipe, built (and so checked)."""
    try:
        return fdl.build(recipe.resume.restore_config.spec)
    except SpecError as error:  # fiddle's stand-in for it adds the whole configuration
        raise getattr(error, "proxy_base_exception", error) from None


def model_config(recipe: run.Partial, parent: Architecture | None = None) -> Any:
    """Return the NeMo model config of an upcycling recipe, built.

    Args:
        recipe: recipe of the upcycled model.
        parent: architecture of its parent, to return the parent's config; None: the upcycled model's.
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
        data_folder: a finished folder of `nemo-upcycle data`.
    """
    recipe.log.explicit_log_dir = str(folder)
    recipe.log.log_dir = None
    recipe.resume.restore_config.path = str(dense_folder)
    train_on(recipe, data_folder, str(dense_folder))


def placed_settings(recipe: run.Partial) -> list[str]:
    """Name the settings of a recipe that a run replaces, or that would let a stage lose its own checkpoints."""
    placed = copy.deepcopy(recipe)
    place_recipe(placed, Path("STAGE"), Path("DENSE"), Path("DATA"))
    given, after = dict(every_setting(recipe)), dict(every_setting(placed))
    return [name for name, value in given.items() if name in _OF_THE_RUN or after.get(name) != value]


def ignored_settings(recipe: run.Partial, usual: run.Partial, where: str = "") -> Iterator[UpcycleError]:
    """Yield the settings that a user has changed and that a run would replace or ignore.

    Args:
        recipe: recipe with the user's settings.
        usual: the same recipe without settings of `PLACED_PARTS`.
        where: prefix of its overrides, for the text of errors.
    """
    given, before = dict(every_setting(recipe)), dict(every_setting(usual))
    for name in placed_settings(recipe):
        if given[name] != before.get(name):
            expected, fix = _DECIDES[name.partition(".")[0]]
            setting = f"{where}{name.removesuffix('.is')}"
            yield UpcycleError(setting, kind="refused", got=f"cannot be set: {expected}", fix=fix)


def train_on(recipe: run.Partial, data_folder: str | Path, dense: str) -> None:
    """Let a recipe train on a finished folder of `nemo-upcycle data`, in place; its batches stay.

    Args:
        recipe: recipe of a training; one that tunes takes a folder of `nemo-upcycle chat`.
        data_folder: the folder.
        dense: the dense model, whose tokenizer the data must have.
    """
    from nemo_upcycle.data.blend_module import blend_data
    from nemo_upcycle.data.chat_module import chat_data

    if recipe.data.__fn_or_cls__ is chat_data:
        recipe.data.dense, recipe.data.folder = dense, str(data_folder)
        return
    kept = ("seq_length", "micro_batch_size", "global_batch_size", "num_workers", "seed", "indices", "skip_samples")
    given = {name: value for name in kept if (value := getattr(recipe.data, name, None)) is not None}
    if recipe.data.__fn_or_cls__ is not blend_data:  # the seed of NeMo's mock data says nothing
        given.pop("seed", None)
    recipe.data = run.Config(blend_data, dense=dense, folder=str(data_folder), **given)
