"""The recipes: one file per model, such as `llama3_8b.py`, with its numbers and the functions that the trainers call.

This folder is installed as `nemo_upcycle.recipes`. In each file, `e8t2`, `dense_ct`, `e8t2_sft` and `dense_sft` make
NeMo's recipes: `llama3_8b_e8t2` on the command line is `e8t2` in `llama3_8b.py`. The functions for Megatron-Bridge
have Bridge's long names. Importing a file imports no trainer. `nemo_upcycle.recipes.upcycled_from` and the other
names in `_NEMO` import NeMo on first use.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from nemo_upcycle.errors import SpecError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.hardware import known_shape
from nemo_upcycle.planning.recipe_table import ANSWERS, CONVERSATIONS, KnownRecipe
from nemo_upcycle.utils import moved
from nemo_upcycle.utils.checkout import require_one_checkout
from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


require_one_checkout()
need_no_cuda_to_import()
__path__.append(moved.__path__[0])
#: Maps each name that a user's recipe can import from here to the module that defines it.
_NEMO = {
    "pipeline": "nemo_upcycle.pipeline.nemo.recipes",
    "upcycled": "nemo_upcycle.trainers.nemo.upcycled",
    "upcycled_from": "nemo_upcycle.trainers.nemo.own_parent",
    "use_spec": "nemo_upcycle.trainers.nemo.upcycled",
    "start_from": "nemo_upcycle.trainers.nemo.upcycled",
    "checkpoints": "nemo_upcycle.trainers.nemo.recipe_parts",
    "with_lora": "nemo_upcycle.trainers.nemo.tuning_recipe",
}
_KINDS = ("e8t2", "dense_ct", "e8t2_sft", "dense_sft")


@cache
def modules() -> dict[str, ModuleType]:
    """Import the files of this folder: name of the model -> module."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__[:1]))
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


@cache
def known_recipes() -> dict[str, KnownRecipe]:
    """List the recipes of both trainers that the planner knows, by their names on the command line."""
    found = [
        _known(model, kind, module)
        for model, module in modules().items()
        if hasattr(module, "LAYOUTS")
        for kind in _KINDS
        if hasattr(module, kind) or any(kind in (one, _baseline(one)) for one in module.BRIDGE_CHAINS)
    ]
    return {recipe.name: recipe for recipe in sorted(found, key=lambda recipe: recipe.name)}


def _baseline(kind: str) -> str:
    return "dense_sft" if kind.endswith("_sft") else "dense_ct"


def _known(model: str, kind: str, module: Any) -> KnownRecipe:
    tunes, is_upcycled = kind.endswith("_sft"), kind.startswith("e8t2")
    in_bridge = next((pair for one, pair in module.BRIDGE_CHAINS.items() if kind in (one, _baseline(one))), None)
    inputs = {"dense": module.TUNING.parent if tunes else module.PARENT}
    if is_upcycled:
        data, evaluation = (CONVERSATIONS, ANSWERS) if tunes else (module.DATA, module.EVALUATION)
        inputs |= {"data": data, "evaluation": evaluation}
    return KnownRecipe(
        name=f"{model}_{kind}",
        title=module.TITLE,
        dense=known_shape(model),
        spec=module.SPEC if is_upcycled else None,
        schedule=module.TUNING.schedule if tunes else module.TRAINING,
        inputs=inputs,
        trainers=(*(("nemo",) if hasattr(module, kind) else ()), *(("bridge",) if in_bridge else ())),
        capacity_factor=module.CAPACITY_FACTOR if is_upcycled else None,
        h100=module.CAPACITY_FACTOR is not None and not tunes,
        tunes=tunes,
        lora=tunes and module.TUNING.lora,
        bridge=in_bridge[0].__name__ if in_bridge and is_upcycled else "",
        bridge_baseline=in_bridge[1].__name__ if in_bridge and is_upcycled else "",
    )


def known_recipe(name: str) -> KnownRecipe:
    """Return a recipe by its name on the command line.

    Raises:
        SpecError: the name is unknown.
    """
    known = known_recipes()
    if name not in known:
        raise SpecError.unknown("recipe", name, known)
    return known[name]


def recipe_for(dense: Architecture, arch: Architecture) -> KnownRecipe | None:
    """Return the recipe that makes an MoE model from a dense model; None if no recipe does.

    The two models of the recipe must compute the same functions as the two given models.

    Example:
        >>> llama = known_recipe("llama3_8b_e8t2")
        >>> recipe_for(llama.dense, llama.arch).name
        'llama3_8b_e8t2'
    """
    return next((known for known in known_recipes().values() if known.makes(dense, arch)), None)


@cache
def bridge_functions() -> dict[str, Callable[..., Any]]:
    """List the functions that make Megatron-Bridge's recipes, by their names."""
    return {
        name: function
        for module in modules().values()
        for name, function in vars(module).items()
        if name.endswith("_config") and function.__module__ == module.__name__
    }


def where_recipes_are() -> str:
    """Return a sentence for a help text that says which folder holds the recipes."""
    return f"The recipes are files of {__path__[0]}: llama3_8b_e8t2 is e8t2 in llama3_8b.py."


def recipe_file(name: str) -> str:
    """Return the path of a recipe's file, relative if it is below the working directory; "" for a user's own recipe.

    Args:
        name: name on the command line, or name of Bridge's function.
    """
    function = nemo_functions().get(name) or bridge_functions().get(name)
    path = str(sys.modules[function.__module__].__file__) if function else ""
    is_near = path and Path(path).is_relative_to(Path.cwd())
    return str(Path(path).relative_to(Path.cwd())) if is_near else path


def __getattr__(name: str) -> Any:
    """Import a name of `_NEMO`, or return the recipe with this command-line name in the form of a NeMo module."""
    if name in _NEMO:
        return getattr(importlib.import_module(_NEMO[name]), name)
    if name.startswith("_") or name not in nemo_functions():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = nemo_functions()[name]
    module = importlib.import_module(function.__module__)
    make = "finetune_recipe" if "start" in inspect.signature(function).parameters else "pretrain_recipe"
    return SimpleNamespace(
        NAME=name,
        SPEC=module.SPEC,
        model=getattr(module, "moe_model" if function.__name__ == "e8t2" else "dense_model", None),
        pipeline_recipe=partial(_chain, module, name),
        **{make: function},
    )


def _chain(module: ModuleType, name: str, **arguments: Any) -> Any:
    """Make the chain around an upcycled model. The pipeline imports this package, so import it late."""
    chains = importlib.import_module(_NEMO["pipeline"]).chains(module.__name__.rpartition(".")[2], module)
    return chains[name](**arguments)


@cache
def nemo_functions() -> dict[str, Callable[..., Any]]:
    """List the functions that make NeMo's recipes, by their command-line names (defaults of the argument `name`)."""
    found = {}
    for module in modules().values():
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                name = inspect.signature(function).parameters.get("name")
                found |= {name.default: function} if name else {}
    return found
