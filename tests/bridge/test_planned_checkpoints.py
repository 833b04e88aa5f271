"""The settings that Megatron-Bridge gives models that are planned only are read back as those models."""

from __future__ import annotations

from dataclasses import fields

import pytest

from benchmarks.published import public_config, shape
from nemo_upcycle.models.flops import flops_per_token
from nemo_upcycle.models.hf_config import architecture_from_config
from nemo_upcycle.sources.planned_checkpoints import planned_config


pytest.importorskip("megatron.bridge", reason="`make test-bridge` has an environment with it")


@pytest.mark.parametrize("name", ["gpt_oss_20b", "deepseek_v3", "kimi_k2", "nemotron_3_nano", "nemotron_3_super"])
def test_the_model_that_bridge_makes_of_a_config_json_is_planned_as_that_is(name: str) -> None:
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig

    types = {"G": "gpt_oss", "D": "deepseek_v3", "N": "nemotron_h"}
    config = public_config(name)
    config.pop("quantization_config", None)
    theirs = AutoConfig.for_model(types[config["architectures"][0][0]], **config)
    provider = AutoBridge.from_hf_config(theirs).to_megatron_provider(load_weights=False)
    settings = planned_config({field.name: getattr(provider, field.name) for field in fields(provider)})
    assert settings is not None
    arch, expected = (
        architecture_from_config(settings | {"vocab_size": config["vocab_size"]}, to_plan=True),
        shape(name),
    )
    for field in ("total_params", "active_params", "mtp_layers", "window_pattern", "moe_pattern", "mamba", "latent"):
        assert getattr(arch, field) == getattr(expected, field), field
    assert flops_per_token(arch, 4096, causal=True) == flops_per_token(expected, 4096, causal=True)
