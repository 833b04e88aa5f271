"""The chains of two recipes, as configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def llama() -> Any:
    from nemo_upcycle import recipes

    return recipes.llama3_8b_e8t2.pipeline_recipe()


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    from nemo_upcycle import recipes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(recipes.smollm2_135m_dense_ct, "cpu_has_fast_bf16", lambda: True)
    return recipes.smollm2_135m_e8t2.pipeline_recipe(processes=2)
