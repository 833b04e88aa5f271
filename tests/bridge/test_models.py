"""Parents that Bridge's model classes cannot be are refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.hardware import known_shape


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("style", ["upcycled_provider", "upcycled_config"])
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scaled_embedding": True}, "multiplies its embedding by sqrt"),
        ({"rope_scaling": DYNAMIC}, "rope_scaling of the dense checkpoint"),
    ],
    ids=["scaled embedding", "RoPE scaling"],
)
def test_a_parent_that_bridges_model_cannot_be_is_refused(changes: dict[str, Any], words: str, style: str) -> None:
    from nemo_upcycle.trainers.bridge import models

    parent = replace(known_shape("llama3_8b"), **changes)
    with pytest.raises(SpecError, match=words):
        getattr(models, style)(parent, UpcycleSpec(num_experts=8, top_k=2), seq_length=64)
