"""`plan --check` with real Transformer Engine modules, where it is installed (`make te-env`); no GPU is needed."""

from __future__ import annotations

import pytest

from nemo_upcycle.planning import check
from nemo_upcycle.planning.hardware import known_recipe
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.workload import Workload


def test_transformer_engine_in_every_precision() -> None:
    recipe = known_recipe("llama3_8b_e8t2")
    layout = parse_layout("tp=2,pp=4,vp=8,ep=8", 64)
    work = Workload(seq_length=8192, global_batch=512)
    result = check.check_layout_against_megatron(recipe.arch, layout, work, recipe.dense, recipe.spec)
    assert result.specs == ("local", *check.TRANSFORMER_ENGINE)


def test_a_difference_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_upcycle.errors import UpcycleError
    from nemo_upcycle.planning.parameters import StagePlan

    recipe = known_recipe("llama3_8b_e8t2")
    layout = parse_layout("ep=8", 8)
    plan = StagePlan(recipe.arch, layout, Workload(seq_length=8192, global_batch=512), 0)
    monkeypatch.setattr(plan, "chunks", [plan.chunks[0][1:]])
    with pytest.raises(UpcycleError, match=r"parameters of chunk 0 \(blockwise\)"):
        check._Checker(recipe.arch, layout, None, None).rank(0, plan, "blockwise")
