"""Nemotron-H's configuration: a pattern of layers, each of them Mamba, attention or FFN."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.errors import CheckpointError, SpecError
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.models.mapping import layer_mappings
from nemo_upcycle.models.megatron_config import hybrid_symbols, megatron_fields
from nemo_upcycle.models.sharding import hf_shapes
from tests.folders import SPEC, converted
from tests.models import write_random


#: Sizes of NVIDIA's Nemotron-H 8B (arXiv 2504.03624, table 1), with 5 of its 52 layers.
CONFIG: dict[str, Any] = {
    **{"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"},
    **{"num_hidden_layers": 5, "hidden_size": 4096, "intermediate_size": 21504, "num_attention_heads": 32},
    **{"num_key_value_heads": 8, "attention_head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64},
    **{"n_groups": 8, "ssm_state_size": 128, "vocab_size": 131072, "mlp_hidden_act": "relu2"},
    **{"layer_norm_epsilon": 1e-5, "time_step_limit": [0.0, float("inf")]},
}
TINY = CONFIG | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "attention_head_dim": 8}
TINY |= {"num_key_value_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4}
TINY |= {"vocab_size": 64}


def test_the_layers_are_those_of_the_pattern() -> None:
    arch = architecture_from_config(CONFIG)
    assert (arch.num_layers, arch.gated, arch.activation, arch.norm_eps) == (5, False, "squared_relu", 1e-5)
    roles = [{mapping.role for mapping in layer_mappings(arch, layer)} for layer in range(5)]
    assert roles[0] == roles[2] > {"mamba_norm", "mamba_in", "mamba_out"}
    assert roles[1] == roles[4] == {"ffn_norm", "fc1", "fc2"}
    assert roles[3] == {"attention_norm", "qkv", "attention_out"}


@pytest.mark.parametrize("config", [CONFIG, TINY], ids=["8B", "tiny"])
def test_parameters_are_counted(config: dict[str, Any]) -> None:
    arch = architecture_from_config(config)
    assert arch.total_params == sum(map(math.prod, hf_shapes(arch).values()))
    more = arch.upcycled(SPEC).total_params - arch.total_params
    assert more == 2 * (3 * arch.ffn_params(arch.ffn_size) + 4 * arch.hidden_size)


def test_a_list_of_kinds_is_a_pattern() -> None:
    config = {name: value for name, value in CONFIG.items() if name != "hybrid_override_pattern"}
    del config["num_hidden_layers"]
    config["layers_block_type"] = ["mamba", "mlp", "mamba", "attention", "mlp"]
    config["time_step_limit"] = [0.0, {"__float__": "Infinity"}]  # the format of transformers 5.12
    assert architecture_from_config(config) == architecture_from_config(CONFIG)


def test_networks_become_experts_and_moe_layers_counts_networks() -> None:
    arch = architecture_from_config(CONFIG)
    assert hybrid_symbols(arch) == "M-M*-"
    assert hybrid_symbols(arch.upcycled(SPEC)) == "MEM*E"
    second = arch.upcycled(UpcycleSpec(num_experts=4, top_k=2, moe_layers=(1,)))
    assert hybrid_symbols(second) == "M-M*E"
    assert megatron_fields(second, hybrid=True)["moe_layer_freq"] == [0, 0, 0, 0, 1]
    with pytest.raises(SpecError, match="the model has 2 layers"):
        arch.upcycled(UpcycleSpec(num_experts=4, top_k=2, moe_layers=(2,)))


def test_flops_count_attention_where_it_is() -> None:
    arch = architecture_from_config(CONFIG)
    scores = flops_per_token(arch, 2048, causal=True) - flops_per_token(arch, 1024, causal=True)
    assert scores == 6 * 32 * 128 * 1024


@pytest.mark.parametrize(
    "changes",
    [
        {"hybrid_override_pattern": "MEM*E"},
        {"hybrid_override_pattern": None, "layers_block_type": ["mamba", "moe"]},
        {"num_hidden_layers": 52},
        {"mlp_hidden_act": "silu"},
        {"conv_kernel": 3},
        {"layer_norm_epsilon": 1e-6},
        {"mlp_bias": True},
        {"time_step_limit": [0.0, 0.1]},
        {"n_groups": 3},
        {"num_nextn_predict_layers": 1},
    ],
    ids=str,
)
def test_what_no_layer_of_megatron_computes_is_refused_by_name(changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        architecture_from_config(CONFIG | changes)
    name, value = list(changes.items())[-1]
    assert (caught.value.subject, caught.value.got) == (f"config.json: {name}", repr(value))


def test_what_has_no_mamba_layers_refuses_it_by_name(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"Mamba layers \(Mixtral, .*Megatron-Bridge"):
        converted(write_random(tmp_path / "dense", TINY), tmp_path / "moe")
    with pytest.raises(CheckpointError, match=r"NemotronHForCausalLM has Mamba layers \(M\)"):
        megatron_fields(architecture_from_config(TINY))
