"""Real Transformer Engine modules have the planned parameters. No GPU is needed."""

from __future__ import annotations

import pytest

from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.planning.layout import parse_layout
from nemo_upcycle.planning.parameters import StageBuffers
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.recipes import known_recipe
from tests.megatron_ranks import TRANSFORMER_ENGINE, build_rank


@pytest.mark.parametrize("engine", TRANSFORMER_ENGINE)
def test_transformer_engine_has_the_planned_parameters(engine: str) -> None:
    arch, layout = known_recipe("llama3_8b_e8t2").arch, parse_layout("tp=2,pp=4,vp=8,ep=8", 64)
    for stage in range(layout.pp):
        plan = StageBuffers(arch, layout, Workload(seq_length=8192, global_batch=512), stage)
        with megatron_rank(layout, stage * layout.gpus // layout.pp):
            chunks = build_rank(arch, layout, engine)
        built = [sum(parameter.numel() for parameter in chunk.parameters()) for chunk in chunks]
        assert built == [sum(param.numel for param in chunk) for chunk in plan.chunks]
