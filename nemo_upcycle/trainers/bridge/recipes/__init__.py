"""Recipes named and shaped like Megatron-Bridge's own; `register` lets Bridge's commands find them by name."""

from __future__ import annotations

from pathlib import Path


def register() -> None:
    """Let Bridge find these recipes: it looks for packages `FAMILY/h100` in the folders of its own."""
    import megatron.bridge.recipes

    folder = str(Path(__file__).parent)
    if folder not in megatron.bridge.recipes.__path__:
        megatron.bridge.recipes.__path__.append(folder)
