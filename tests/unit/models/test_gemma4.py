"""Gemma 4 as published: the heads of each layer, the network kept beside the experts, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.hf_config import architecture_from_config, read_architecture
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.models.sharding import hf_shapes
from nemo_upcycle.utils.files import read_json
from tests.folders import converted


_FULL = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
#: The format of transformers 5.12; 5.24 has `per_layer_config` in place of the settings for global heads.
SMALL: dict[str, Any] = {
    **{"architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text", "vocab_size": 40, "hidden_size": 16},
    **{"intermediate_size": 24, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 8, "global_head_dim": 12, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    **{"sliding_window": 5, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    "rope_parameters": {"full_attention": _FULL, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
}


def _write(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL))
    shapes = hf_shapes(architecture_from_config(SMALL))
    save_file({name: torch.randn(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


def test_each_layer_has_its_own_heads(tmp_path: Path) -> None:
    parent = load_file(_write(tmp_path / "dense") / "model.safetensors")
    assert parent["model.layers.0.self_attn.q_proj.weight"].shape == (32, 16)
    assert parent["model.layers.5.self_attn.q_proj.weight"].shape == (48, 16)
    assert parent["model.layers.5.self_attn.k_proj.weight"].shape == (12, 16)
    assert {name.split(".")[2] for name in parent if "v_proj" in name} == set("01234")
    spec = UpcycleSpec(num_experts=4, top_k=2, granularity=2)
    with open_dense(tmp_path / "dense") as dense:
        assert dense.architecture.total_params == sum(tensor.numel() for tensor in parent.values())
    converted(tmp_path / "dense", tmp_path / "moe", spec)
    with pytest.raises(SpecError, match="shared experts beside the network that is kept"):
        converted(tmp_path / "dense", tmp_path / "no", replace(spec, shared_experts=1))
    moe = load_file(tmp_path / "moe/model.safetensors")
    assert moe.keys() > parent.keys()
    assert all(torch.equal(moe[name], tensor) for name, tensor in parent.items())
    layer = "model.layers.3."
    norm = parent[layer + "pre_feedforward_layernorm.weight"]
    assert torch.equal(moe[layer + "pre_feedforward_layernorm_2.weight"], norm)
    gate, up = moe[layer + "experts.gate_up_proj"][1].chunk(2)
    assert torch.equal(gate, parent[layer + "mlp.gate_proj.weight"][12:])
    assert torch.equal(up, parent[layer + "mlp.up_proj.weight"][12:])
    ones = ("post_feedforward_layernorm_1.weight", "post_feedforward_layernorm_2.weight", "router.scale")
    assert all(bool((moe[layer + name] == 1).all()) for name in (*ones, "router.per_expert_scale"))
    said, arch = read_json(tmp_path / "moe/config.json"), read_architecture(tmp_path / "moe")
    assert (said["architectures"], said["enable_moe_block"]) == (["Gemma4ForCausalLM"], True)
    assert said["rope_parameters"] == SMALL["rope_parameters"]
    assert arch == read_architecture(tmp_path / "dense").upcycled(spec)


def test_heads_are_read_as_newer_releases_write_them() -> None:
    own = {"head_dim": 12, "num_key_value_heads": 1}
    assert architecture_from_config(SMALL | {"rope_parameters": None}) == architecture_from_config(SMALL)
    kept = {name: value for name, value in SMALL.items() if "global" not in name}
    assert architecture_from_config(kept | {"per_layer_config": {"5": own}}) == architecture_from_config(SMALL)
    with pytest.raises(CheckpointError, match=r"per_layer_config is .* expected the same in layers 5, and none in"):
        architecture_from_config(kept | {"per_layer_config": {"4": own, "5": own}})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input is 256; expected 0"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2; expected 0"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'; expected null or vision"),
        ({"rope_parameters": _FULL}, "rope_parameters is .* expected one entry for layers with a window"),
    ],
)
def test_what_is_not_known_of_a_gemma_4_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        architecture_from_config(SMALL | changes)


def test_no_trainer_builds_one() -> None:
    with pytest.raises(
        CheckpointError, match=r"Layers of Gemma4ForCausalLM cannot be trained: they have heads of two sizes.* Convert"
    ):
        megatron_fields(architecture_from_config(SMALL))
