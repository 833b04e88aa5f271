"""Build the Megatron-Bridge recipes of `recipes/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def register(recipes: Mapping[str, Callable[..., Any]]) -> None:
    """Add recipes to `megatron.bridge.recipes`, where Bridge looks them up by name.

    Args:
        recipes: functions of the recipes, by name.
    """
    import megatron.bridge.recipes

    for name, recipe in recipes.items():
        setattr(megatron.bridge.recipes, name, recipe)
