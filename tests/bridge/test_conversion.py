"""Bridge's own conversion of the classes that it lacks: what is imported is exported again, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from tests.distributed.ranks import run_ranks
from tests.models import write_llama


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2, "ep": 2}], ids=str)
def test_a_mixtral_is_imported_and_exported_with_the_same_bits(
    tmp_path: Path, tied: bool, layout: dict[str, int]
) -> None:
    dense = write_llama(tmp_path / "dense", tied=tied, vocab_size=256)
    with open_dense(dense) as source:
        convert(source, tmp_path / "moe", UpcycleSpec(num_experts=4), dtype=torch.float32, progress=False)
    (exported, *_) = run_ranks(_round_trip, max([1, *layout.values()]), tmp_path / "moe", layout)
    with SafetensorsFolder(tmp_path / "moe") as moe:
        assert set(exported) == set(moe.names())
        assert [name for name in moe.names() if not torch.equal(exported[name], moe.read(name))] == []


def _round_trip(folder: Path, layout: dict[str, int]) -> dict[str, torch.Tensor]:
    from nemo_upcycle.cpu.backend import use_cpu_backend

    use_cpu_backend()
    from megatron.bridge import AutoBridge

    import nemo_upcycle.bridge.conversion  # noqa: F401
    from tests.bridge.runs import SIZES

    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider(load_weights=True)
    settings: dict[str, Any] = {"params_dtype": torch.float32, "bf16": False, "sequence_parallel": "tp" in layout}
    for name, value in (settings | {SIZES[name]: size for name, size in layout.items()}).items():
        setattr(provider, name, value)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    return {name: tensor.clone() for name, tensor in bridge.export_hf_weights(model, cpu=True, show_progress=False)}
