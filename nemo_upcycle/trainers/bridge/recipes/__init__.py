"""Build the recipes of Megatron-Bridge in `recipes/`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def register(recipes: Mapping[str, Callable[..., Any]]) -> None:
    """Let Bridge find recipes: it looks in its package of recipes, and for H100 alone in those of families.

    Args:
        recipes: name -> function.
    """
    import megatron.bridge.recipes

    for name, recipe in recipes.items():
        setattr(megatron.bridge.recipes, name, recipe)
