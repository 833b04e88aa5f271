"""This package adds classes to Bridge's conversion. Import and export change no bit of their models."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.files import read_json
from tests.bridge.runs import offline
from tests.distributed.ranks import run_ranks
from tests.loading.cases import PARENTS
from tests.models import PARALLEL, write_llama, write_olmo2, write_qwen2


DENSE = {name: PARENTS[name] for name in ("Phi-3", "OLMo 2", "OLMo 3", "Granite 3")}


def _folder(name: str, folder: Path) -> Path:
    """Write a model folder of a class that Bridge lacks. MoE folders are made by `convert`."""
    if name in DENSE:
        return DENSE[name](folder / "dense", vocab_size=256)
    fields: dict[str, Any] = {"num_experts": 4, "top_k": 2}
    if name == "FlexOlmo":
        dense = write_olmo2(folder / "dense", vocab_size=256)
    elif name.startswith("Mixtral"):
        dense = write_llama(folder / "dense", tied="tied" in name, vocab_size=256)
    else:  # Qwen2-MoE; if it has dense layers, the class needs a shared expert of zeros
        dense = write_qwen2(folder / "dense", vocab_size=256)
        fields |= {"shared_experts": 1} if "shared" in name else {"moe_layers": "every-2"}
    offline(dense, folder / "moe", fields)
    hf_class = f"{name.partition(',')[0].replace('-MoE', 'Moe')}ForCausalLM"
    assert read_json(folder / "moe/config.json")["architectures"] == [hf_class]
    return folder / "moe"


MOES = ["Mixtral", "Mixtral, tied", "Qwen2-MoE, shared experts", "Qwen2-MoE, dense layers"]
CASES = [
    *itertools.product([*MOES, "FlexOlmo"], [{}, {"ep": 2}, {"tp": 2, "ep": 2}]),
    *itertools.product(DENSE, [{}, {"tp": 2}]),
]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_a_folder_is_imported_and_exported_with_the_same_bits(
    tmp_path: Path, name: str, layout: dict[str, int]
) -> None:
    folder = _folder(name, tmp_path)
    (exported, *_) = run_ranks(_round_trip, max([1, *layout.values()]), folder, layout)
    with SafetensorsFolder(folder) as moe:
        assert set(exported) == set(moe.names())
        assert all(torch.equal(exported[name], moe.read(name)) for name in moe.names())


def _round_trip(folder: Path, layout: dict[str, int]) -> dict[str, torch.Tensor]:
    """Load a folder with the bridge of its class, and return the tensors that the bridge exports."""
    use_cpu_backend()
    from megatron.bridge import AutoBridge

    import nemo_upcycle.trainers.bridge.conversion  # noqa: F401

    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider(load_weights=True)
    settings: dict[str, Any] = {"params_dtype": torch.float32, "bf16": False, "sequence_parallel": "tp" in layout}
    for name, value in (settings | {PARALLEL[name]: size for name, size in layout.items()}).items():
        setattr(provider, name, value)
    provider.finalize()
    provider.initialize_model_parallel(seed=0)
    model = provider.provide_distributed_model(wrap_with_ddp=False)
    return {name: tensor.clone() for name, tensor in bridge.export_hf_weights(model, cpu=True, show_progress=False)}
