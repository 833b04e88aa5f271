"""Marks for all tests in this folder: they need a CUDA device and Transformer Engine."""

from __future__ import annotations

import importlib.util

import pytest
import torch


NEEDS_CARD = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or importlib.util.find_spec("transformer_engine") is None,
        reason="needs a CUDA device and Transformer Engine",
    ),
]
