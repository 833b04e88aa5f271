"""The recipes, imported once per session because the import loads NeMo."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def recipes() -> Any:
    import nemo_upcycle.pipeline.nemo.recipes  # noqa: F401  registers them, as the command `nemo` does
    from nemo_upcycle import recipes

    return recipes
