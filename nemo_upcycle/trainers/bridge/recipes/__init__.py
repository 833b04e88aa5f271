"""Recipes named and shaped like Megatron-Bridge's own; `register` lets Bridge's commands find them by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from megatron.bridge.training.config import ConfigContainer


def named_recipes() -> dict[str, Callable[[], ConfigContainer]]:
    """Return the recipes for all GPUs by their names."""
    from nemo_upcycle.trainers.bridge.recipes.upcycled import b200, gb200, h100

    return {name: getattr(gpu, name) for gpu in (h100, b200, gb200) for name in gpu.__all__}


def register() -> None:
    """Let Bridge find these recipes: it looks in its package of recipes, and for H100 alone in those of families."""
    import megatron.bridge.recipes

    for name, recipe in named_recipes().items():
        setattr(megatron.bridge.recipes, name, recipe)
