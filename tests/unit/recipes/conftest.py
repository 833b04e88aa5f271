"""The recipes, imported once: with them comes NeMo."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture(scope="session")
def recipes() -> Any:
    from nemo_upcycle import recipes

    return recipes
