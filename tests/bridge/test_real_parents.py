"""Parents of real size in Bridge: a provider built only from a `config.json` has the planned parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.models.hf_config import read_architecture
from tests.unit.cli.test_plan_parents import PARENTS


SPEC = UpcycleSpec(num_experts=8, top_k=2)


@pytest.mark.parametrize("name", PARENTS)
def test_a_real_parent_has_the_planned_parameters(tmp_path: Path, name: str) -> None:
    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.cpu.one_rank import one_rank
    from nemo_upcycle.trainers.bridge.models import upcycled_provider

    use_cpu_backend()
    (tmp_path / "config.json").write_text(json.dumps(PARENTS[name][1]))
    arch = read_architecture(tmp_path).upcycled(SPEC)
    on_meta = {"init_model_with_meta_device": True, "use_cpu_initialization": True, "perform_initialization": False}
    provider = upcycled_provider(tmp_path, SPEC, seq_length=4096, **on_meta)
    provider.finalize()
    with one_rank(), torch.device("meta"):
        model = provider.provide(pre_process=True, post_process=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == arch.total_params
