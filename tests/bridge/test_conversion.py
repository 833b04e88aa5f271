"""Bridge's own conversion of the classes that it lacks: what is imported is exported again, bit by bit."""

from __future__ import annotations

import itertools
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bridge_contribution import CONTRIBUTION as FOLDER
from benchmarks.bridge_contribution import EDITS, apply
from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.sources.safetensors_folder import SafetensorsFolder
from nemo_upcycle.utils.files import read_json
from tests.bridge.runs import offline
from tests.distributed.ranks import run_ranks
from tests.loading.cases import PARENTS
from tests.models import PARALLEL, write_llama, write_olmo2, write_qwen2


DENSE = {name: PARENTS[name] for name in ("Phi-3", "OLMo 2", "OLMo 3", "Granite 3")}


def _folder(name: str, folder: Path) -> Path:
    """Write a folder of a class that Bridge lacks; MoEs are made by `convert`."""
    if name in DENSE:
        return DENSE[name](folder / "dense", vocab_size=256)
    fields: dict[str, Any] = {"num_experts": 4, "top_k": 2}
    if name == "FlexOlmo":
        dense = write_olmo2(folder / "dense", vocab_size=256)
    elif name.startswith("Mixtral"):
        dense = write_llama(folder / "dense", tied="tied" in name, vocab_size=256)
    else:  # a shared expert of the model, or one of zeros beside dense layers
        dense = write_qwen2(folder / "dense", vocab_size=256)
        fields |= {"shared_experts": 1} if "shared" in name else {"moe_layers": "every-2"}
    offline(dense, folder / "moe", fields)
    hf_class = f"{name.partition(',')[0].replace('-MoE', 'Moe')}ForCausalLM"
    assert read_json(folder / "moe/config.json")["architectures"] == [hf_class]
    return folder / "moe"


MOES = ["Mixtral", "Mixtral, tied", "Qwen2-MoE, shared experts", "Qwen2-MoE, dense layers"]
#: Class -> file of its bridge in the form that Megatron-Bridge asks for, and the bridge.
CONTRIBUTION = {
    "MixtralForCausalLM": ("mixtral/mixtral_bridge.py", "MixtralBridge"),
    "Qwen2MoeForCausalLM": ("qwen/qwen2_moe_bridge.py", "Qwen2MoEBridge"),
}
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
    assert _is_as_in(folder, exported)


def _is_as_in(folder: Path, exported: dict[str, torch.Tensor]) -> bool:
    with SafetensorsFolder(folder) as moe:
        assert set(exported) == set(moe.names())
        return all(torch.equal(exported[name], moe.read(name)) for name in moe.names())


def _loaded(folder: Path, layout: dict[str, int]) -> tuple[Any, Any]:
    """Return the bridge of a folder, and the model that it loads."""
    from megatron.bridge import AutoBridge
    from megatron.core import parallel_state

    import nemo_upcycle.trainers.bridge.conversion  # noqa: F401

    bridge = AutoBridge.from_hf_pretrained(str(folder))
    provider = bridge.to_megatron_provider(load_weights=True)
    settings: dict[str, Any] = {"params_dtype": torch.float32, "bf16": False, "sequence_parallel": "tp" in layout}
    for name, value in (settings | {PARALLEL[name]: size for name, size in layout.items()}).items():
        setattr(provider, name, value)
    provider.finalize()
    if not parallel_state.is_initialized():
        provider.initialize_model_parallel(seed=0)
    return bridge, provider.provide_distributed_model(wrap_with_ddp=False)


def _round_trip(folder: Path, layout: dict[str, int]) -> dict[str, torch.Tensor]:
    use_cpu_backend()
    bridge, model = _loaded(folder, layout)
    return {name: tensor.clone() for name, tensor in bridge.export_hf_weights(model, cpu=True, show_progress=False)}


def test_bridges_in_the_form_of_a_contribution_make_the_same_models(tmp_path: Path) -> None:
    folders = {name: _folder(name, tmp_path / str(number)) for number, name in enumerate(MOES)}
    (found,) = run_ranks(_by_contribution, 1, list(folders.values()))
    for (name, folder), (classes, ours, theirs, exported) in zip(folders.items(), found, strict=True):
        hf_class = "MixtralForCausalLM" if name.startswith("Mixtral") else "Qwen2MoeForCausalLM"
        assert classes == (f"{hf_class}Bridge", CONTRIBUTION[hf_class][1])
        assert set(ours) == set(theirs)
        assert [tensor for tensor in ours if not torch.equal(ours[tensor], theirs[tensor])] == [], name
        assert _is_as_in(folder, exported)


def test_the_contribution_is_applied_once_or_not_at_all(tmp_path: Path) -> None:
    for name, _, _ in EDITS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("".join(old for other, old, _ in EDITS if other == name))
    names = apply(tmp_path)
    texts = {name: (tmp_path / name).read_text() for name in names}
    assert {name for name, _, _ in EDITS} < set(names)
    assert all(new in texts[name] for name, _, new in EDITS)
    assert {name: (tmp_path / name).read_text() for name in apply(tmp_path)} == texts

    (tmp_path / names[0]).unlink()
    (tmp_path / EDITS[-1][0]).write_text("of another release")
    with pytest.raises(SystemExit, match=r"got 0 times .*, expected once"):
        apply(tmp_path)
    assert not (tmp_path / names[0]).exists()


def _by_contribution(folders: list[Path]) -> list[Any]:
    """Return of each folder the classes of the bridges, the models that both make, and what the second exports."""
    use_cpu_backend()
    ours = [_loaded(folder, {}) for folder in folders]
    kinds = [type(bridge._model_bridge).__name__ for bridge, _ in ours]
    for file, _ in CONTRIBUTION.values():
        runpy.run_path(str(FOLDER / "src/megatron/bridge/models" / file))  # registers its bridge in the place of ours
    theirs = [_loaded(folder, {}) for folder in folders]
    return [
        (
            (kind, type(bridge._model_bridge).__name__),
            dict(model[0].named_parameters()),
            dict(same[0].named_parameters()),
            dict(bridge.export_hf_weights(same, cpu=True, show_progress=False)),
        )
        for kind, (_, model), (bridge, same) in zip(kinds, ours, theirs, strict=True)
    ]
