"""`plan --check` with real Transformer Engine modules, where it is installed (`make te-env`); no GPU is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle.errors import UpcycleError
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
    build = check.build_rank

    def build_one_more(arch: Any, layout: Any, engine: str | None) -> list[Any]:
        chunks = build(arch, layout, engine)
        if engine == "blockwise":
            chunks[0].register_parameter("more", torch.nn.Parameter(torch.empty(1)))
        return chunks

    monkeypatch.setattr(check, "build_rank", build_one_more)
    recipe = known_recipe("llama3_8b_e8t2")
    work = Workload(seq_length=8192, global_batch=512)
    with pytest.raises(UpcycleError) as caught:
        check.check_layout_against_megatron(recipe.arch, parse_layout("ep=8", 8), work)
    assert caught.value.subject == "rank 0: parameters of chunk 0 (blockwise)"
