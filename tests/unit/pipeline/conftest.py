"""The chains of recipes, as configurations."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch


@cache
def _chain_of(recipe: str) -> Any:
    from nemo_upcycle import recipes

    return getattr(recipes, recipe).pipeline_recipe()


@pytest.fixture
def llama() -> Any:
    return copy.deepcopy(_chain_of("llama3_8b_e8t2"))


@pytest.fixture
def large() -> Any:
    return copy.deepcopy(_chain_of("llama3_70b_e8t2"))


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    from nemo_upcycle import recipes
    from nemo_upcycle.trainers.nemo import recipe_parts

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(recipe_parts, "cpu_has_fast_bf16", lambda: True)
    return recipes.smollm2_135m_e8t2.pipeline_recipe(processes=2)
