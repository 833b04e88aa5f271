"""Dense layers between MoE layers: Megatron saves such models layer by layer, and the export reads them so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_checkpoint, export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.cpu.one_rank import one_rank
from nemo_upcycle.models.hf_config import read_architecture
from tests.distributed.ranks import run_ranks
from tests.models import build_chunks, moe_settings, write_llama
from tests.tiers import quick


SPEC = UpcycleSpec(
    num_experts=8, top_k=4, granularity=2, shared_experts=1, moe_layers=(0, 3), router_std=1.0, method="noise"
)


def _upcycled(folder: Path, spec: UpcycleSpec, layout: dict[str, int], **fields: Any) -> list[torch.nn.Module]:
    with open_dense(folder) as dense:
        chunks = build_chunks(dense.architecture, layout=layout, **moe_settings(dense.architecture, spec), **fields)
        upcycle_into(chunks, dense, spec)
    return chunks


def save_upcycled(
    folder: str, output: str, spec: UpcycleSpec, layout: dict[str, int], fields: dict[str, Any] | None = None
) -> None:
    """Save a model that was not trained; biases that balance experts, where its parent has none, are made some."""
    from megatron.core import dist_checkpointing

    (chunk,) = _upcycled(Path(folder), spec, layout, **(fields or {}))
    for name, bias in chunk.named_buffers():
        if name.endswith("expert_bias") and not read_architecture(Path(folder)).balancing_bias:
            assert not bias.any()
            bias.copy_(torch.linspace(-0.3, 0.4, bias.numel()).roll(int(name.split(".")[2])))
    Path(output).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(chunk.sharded_state_dict(prefix="module."), output)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("mixed") / "dense")


@pytest.mark.parametrize(
    ("ranks", "layout"),
    quick([(2, {"pp": 2}), (4, {"tp": 2, "ep": 2})], (2, {"pp": 2})),
    ids=lambda value: str(value).replace("'", ""),
)
def test_mixed_layers_are_exported_whole(dense: Path, tmp_path: Path, ranks: int, layout: dict[str, int]) -> None:
    run_ranks(save_upcycled, ranks, str(dense), str(tmp_path / "saved/weights"), SPEC, layout)
    export_checkpoint(tmp_path / "saved", dense, tmp_path / "hf", spec=SPEC, dtype=torch.float32)
    with one_rank():
        (model,) = _upcycled(dense, SPEC, {})
        with open_dense(dense) as source:
            arch = source.architecture.upcycled(SPEC)
        export_weights(LiveWeights(model), arch, dense, tmp_path / "live", dtype=torch.float32)
    saved, live = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "live"))
    assert saved.keys() == live.keys()
    assert all(torch.equal(tensor, live[name]) for name, tensor in saved.items())
    assert sum("mlp.gate.weight" in name for name in saved) == 2
    assert sum(name.endswith("mlp.down_proj.weight") for name in saved) == 2
