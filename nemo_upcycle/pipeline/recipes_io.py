"""Recipes between the launcher and the stages: serialised by NeMo-Run, checked, and pointed to a run's folder."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer
from torch.nn.parallel import DistributedDataParallel

from nemo_upcycle.errors import SpecError, did_you_mean
from nemo_upcycle.models.megatron_config import check_spec
from nemo_upcycle.pipeline.console import quiet_imports
from nemo_upcycle.training.layout import check_layout
from nemo_upcycle.training.schedules import schedules_of
from nemo_upcycle.training.values import check_values, setting
from nemo_upcycle.utils.validation import is_whole


def dump_recipe(recipe: run.Partial) -> str:
    """Return a recipe as text. The same recipe gives the same text."""
    return ZlibJSONSerializer().serialize(recipe)


def load_recipe(text: str) -> run.Partial:
    """Return the recipe of a text from `dump_recipe`."""
    with quiet_imports():  # a stage's own process has not imported NeMo yet
        return ZlibJSONSerializer().deserialize(text)


def write_recipes(run_dir: Path, recipes: Mapping[str, Any]) -> None:
    """Write the recipes of a run as `recipes/NAME.yaml`, for people: one setting per line, named like an override."""
    folder = run_dir / "recipes"
    folder.mkdir(exist_ok=True)
    for name, recipe in recipes.items():
        lines = [f"{key}: {value}\n" for key, value in settings(recipe)] if recipe else []
        (folder / f"{name}.yaml").write_text("".join(lines), encoding="utf-8")


def settings(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield every setting of a configuration as its path and its value in YAML, in the order of its arguments."""
    if isinstance(value, fdl.Buildable):
        target = value.__fn_or_cls__
        yield f"{path}.is" if path else "is", f"{target.__module__}.{target.__qualname__}"
        for name, inner in value.__arguments__.items():
            yield from settings(inner, f"{path}.{name}" if path else name)
    elif isinstance(value, (list, tuple)) and any(isinstance(item, fdl.Buildable) for item in value):
        for number, item in enumerate(value):
            yield from settings(item, f"{path}.{number}")
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return str(list(value) if isinstance(value, tuple) else value)


def ranks_of(recipe: run.Partial, where: str = "") -> tuple[int, int]:
    """Return the nodes and the ranks per node that a recipe's trainer asks for.

    Args:
        recipe: of a training job.
        where: prefix of its overrides, for the text of errors.

    Raises:
        SpecError: a number is missing or not valid.
    """
    return _whole(recipe, "num_nodes", 1, where), _whole(recipe, "devices", None, where)


def _whole(recipe: run.Partial, name: str, default: int | None, where: str) -> int:
    value: Any = getattr(recipe.trainer, name, None)
    value = default if value is None else value
    if not is_whole(value, 1):
        raise SpecError(
            f"{where}trainer.{name}", got=value, expected="a whole number from 1 on", fix=f"set {name} to how many"
        )
    return value


def check_recipe(recipe: run.Partial, where: str = "") -> None:
    """Check a recipe before it is launched.

    Args:
        recipe: of a training job.
        where: prefix of its overrides, for the text of errors.

    Raises:
        SpecError: layout, model, data and ranks do not fit, or the upcycling spec is not valid or not the model's.
    """
    nodes, per_node = ranks_of(recipe, where)
    check_settings(recipe, where)
    try:
        check_layout(recipe.trainer.strategy, recipe.model.config, recipe.data, nodes * per_node)
    except SpecError as error:
        raise error.renamed(lambda name: f"{where}{name}") from None


def check_settings(recipe: run.Partial, where: str = "") -> None:
    """Check what can be told of a recipe whatever ranks it gets: names, values, and that spec and model agree.

    Args:
        recipe: of a training job.
        where: prefix of its overrides, for the text of errors.

    Raises:
        SpecError: a setting is not valid, or not the spec's.
    """
    _check_names(recipe.trainer.strategy, f"{where}trainer.strategy")
    check_values(recipe, "nemo", where)
    names = inspect.signature(schedules_of).parameters  # of `UpcycleOptimizer`; NeMo's own has none of them
    try:
        schedules_of(**{name: value for name in names if (value := setting(recipe, f"optim.{name}")) is not None})
    except SpecError as error:
        raise error.renamed(lambda name: f"{where}optim.{name}") from None
    try:
        if setting(recipe, "resume.restore_config.spec"):
            check_spec(recipe.model.config, spec_of(recipe))
    except SpecError as error:  # of a setting, by its path, or of a field of the spec
        spec = "resume.restore_config.spec."
        raise error.renamed(lambda name: f"{where}{name}" if "." in name else f"{where}{spec}{name}") from None


def _check_names(strategy: Any, where: str) -> None:
    """Check the names of a strategy's settings: NeMo's class takes any keyword and ignores unknown ones."""
    classes = (*strategy.__fn_or_cls__.__mro__, DistributedDataParallel)
    known = {name for cls in classes if "__init__" in vars(cls) for name in inspect.signature(cls.__init__).parameters}
    for name in strategy.__arguments__:
        if name not in known:
            raise SpecError(f"setting '{where}.{name}' does not exist.{did_you_mean(name, known, prefix=f'{where}.')}")


def spec_of(recipe: run.Partial) -> Any:
    """Return the upcycling spec of a recipe, built (and so checked)."""
    try:
        return fdl.build(recipe.resume.restore_config.spec)
    except SpecError as error:  # fiddle's stand-in for it adds the whole configuration
        raise getattr(error, "proxy_base_exception", error) from None


def model_config(recipe: run.Partial, *, dense: bool) -> Any:
    """Return the NeMo model config of an upcycling recipe, or that of its dense parent, built."""
    config = copy.deepcopy(recipe.model.config)
    if dense:
        config.num_moe_experts = None
    return fdl.build(config)


def place_recipe(recipe: run.Partial, folder: Path, dense_folder: Path, data_folder: Path) -> None:
    """Point a recipe to a run's folders, in place.

    Args:
        recipe: of a training stage.
        folder: where logs and checkpoints go.
        dense_folder: the dense parent.
        data_folder: a finished folder of `nemo-upcycle data`.
    """
    recipe.log.explicit_log_dir = str(folder)
    recipe.log.log_dir = None
    recipe.resume.restore_config.path = str(dense_folder)
    train_on(recipe, data_folder, str(dense_folder))


def train_on(recipe: run.Partial, data_folder: str | Path, dense: str) -> None:
    """Let a recipe train on a finished folder of `nemo-upcycle data`, in place; its batches stay.

    Args:
        recipe: of a training.
        data_folder: the folder.
        dense: the dense model, whose tokenizer the data must have.
    """
    from nemo_upcycle.data.blend_module import blend_data

    kept = ("seq_length", "micro_batch_size", "global_batch_size", "num_workers", "seed", "run_tokens", "indices")
    given = {name: value for name in kept if (value := getattr(recipe.data, name, None)) is not None}
    if recipe.data.__fn_or_cls__ is not blend_data:  # the seed of NeMo's mock data says nothing
        given.pop("seed", None)
    recipe.data = run.Config(blend_data, dense=dense, folder=str(data_folder), **given)
