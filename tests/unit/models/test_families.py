"""A model family is one file. Invented families are read, upcycled, converted and exported like real families."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_upcycle import UpcycleSpec, open_dense, upcycle_into
from nemo_upcycle.convert.export import export_checkpoint, export_weights
from nemo_upcycle.convert.megatron_weights import LiveWeights
from nemo_upcycle.convert.offline import convert
from nemo_upcycle.convert.verification import verify
from nemo_upcycle.errors import SpecError
from nemo_upcycle.models import families
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.families import MoeFamily, llama
from nemo_upcycle.models.families.base import ConfigValues
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.sources.megatron_checkpoint import MegatronCheckpoint
from tests.families import registered
from tests.models import build_chunks, moe_settings, require_same_weights, weights_of, write_llama, write_phi3
from tests.unit.convert.exports import write_checkpoint


class _Target(MoeFamily):
    """A family that has only sigmoid scores, and whose class doubles the experts' output."""

    def unsupported(self, arch: Architecture) -> Iterator[str]:
        if arch.router_score != "sigmoid":
            yield "softmax scores"
        if arch.shared_ffn_size:
            yield "shared experts"

    def experts(self, config: ConfigValues, num_layers: int) -> dict[str, Any]:
        return {
            "num_experts": config.whole("pool"),
            "top_k": config.whole("num_experts_per_tok"),
            "expert_ffn_size": config.whole("expert_size"),
            "router_score": "sigmoid",
            "routed_scaling_factor": config.number("scale"),
            "moe_pattern": (True, *[False] * (num_layers - 1)),
        }

    def expert_settings(self, arch: Architecture) -> dict[str, Any]:
        return {"pool": arch.num_experts, "expert_size": arch.expert_ffn_size, "scale": arch.routed_scaling_factor}

    def constants(self, arch: Architecture) -> dict[str, tuple[int, ...]]:
        return self.in_moe_layers({"model.layers.{layer}.moe.shift": (arch.num_experts or 0,)}, arch)


_EXPERT = "model.layers.{layer}.moe.expert_{expert}."
TARGET = _Target(
    title="Made-up MoE",
    hf_class="MadeUpMoeForCausalLM",
    model_type="made_up_moe",
    names=llama.NAMES
    | {
        "router": ("model.layers.{layer}.moe.router.weight",),
        "expert_fc1": (_EXPERT + "gate", _EXPERT + "up"),
        "expert_fc2": (_EXPERT + "down",),
    },
    defaults=llama.FAMILY.defaults,
    hf_factors={"expert_fc2": 0.5},
)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("method", ["copy", "drop"])
def test_a_target_family_from_outside_holds_what_no_other_can(tmp_path: Path, method: str) -> None:
    fields = {"num_experts": 4, "moe_layers": "0", "router_score": "sigmoid", "routed_scaling_factor": 2.0}
    spec, folder = UpcycleSpec(**fields, method=method), write_llama(tmp_path / "dense", layers=2)
    with open_dense(folder) as dense, pytest.raises(SpecError, match="This MoE fits no Hugging Face class"):
        convert(dense, tmp_path / "offline", spec)
    with registered(TARGET):
        arch, online = read_architecture(folder), tmp_path / "online"
        (model,) = build_chunks(folder, **moe_settings(arch, spec))
        with open_dense(folder) as dense:
            upcycle_into([model], dense, spec)
            convert(dense, tmp_path / "offline", spec)
        export_weights(LiveWeights(model), arch.upcycled(spec), folder, online, dtype=torch.float32)
        require_same_weights(online, tmp_path / "offline")
        assert read_architecture(online) == arch.upcycled(spec)
        assert verify(folder, online, logits=False).equal is (method == "copy")
    wanted, found = weights_of(folder), weights_of(online)
    down = wanted["model.layers.0.mlp.down_proj.weight"] * spec.down_scale * 0.5
    assert torch.equal(found["model.layers.0.moe.expert_3.down"], down) is (method == "copy")
    assert not found["model.layers.0.moe.shift"].any()


def test_a_checkpoint_is_read_and_exported_under_fused_names(tmp_path: Path) -> None:
    parent, same_sizes = write_phi3(tmp_path / "phi3"), write_llama(tmp_path / "llama", layers=2)
    folders = [write_checkpoint(tmp_path / "fused", parent, None), tmp_path / "apart"]
    shutil.copytree(*folders)
    exported = weights_of(export_checkpoint(folders[0], parent, tmp_path / "hf", dtype=torch.float32))
    for folder, same in zip(folders, (parent, same_sizes), strict=True):
        shutil.copy(same / "config.json", folder)
    with MegatronCheckpoint(folders[0]) as fused, MegatronCheckpoint(folders[1]) as apart:
        assert all(torch.equal(fused.read(name), exported[name]) for name in fused.names())
        for layer in ("model.layers.0.", "model.layers.1."):
            parts = [apart.read(f"{layer}self_attn.{part}_proj.weight") for part in "qkv"]
            assert torch.equal(fused.read(layer + "self_attn.qkv_proj.weight"), whole := torch.cat(parts))
            for start, stop in ((0, 0), (5, 70), (64, 96), (70, 128)):  # no rows, then rows of 2, 1 and 2 parts
                bounds = [(start, stop), (3, 64)]
                assert torch.equal(fused.read(layer + "self_attn.qkv_proj.weight", bounds), whole[start:stop, 3:])


def test_a_page_names_every_parent() -> None:
    parents = (Path(__file__).parents[3] / "docs/parents.md").read_text(encoding="utf-8")
    for family in families.parents():
        assert f"\n| {family.title}" in parents or f", {family.title}" in parents or f"; {family.title}" in parents


def test_the_readme_counts_the_families() -> None:
    root = Path(__file__).parents[3]
    assert f"{len(families.parents())} families" in (root / "README.md").read_text(encoding="utf-8")
    text = " ".join((root / "docs/own_model.md").read_text(encoding="utf-8").split())
    nemo_has = [family.title for family in families.parents() if family.nemo_module not in ("", "olmo2")]
    assert f"NeMo's recipe of a dense {', '.join(nemo_has[:-1])} or {nemo_has[-1]}, or" in text
