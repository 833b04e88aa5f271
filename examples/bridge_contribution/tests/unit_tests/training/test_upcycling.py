# Copyright (c) 2026, NVIDIA CORPORATION.  All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Unit tests for the upcycling config, its mappings and its hook."""

from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    ConcatenatedQKVMapping,
    GatedMLPMapping,
    ReplicatedMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.upcycling import (
    UpcyclingConfig,
    UpcyclingMappingRegistry,
    _verify_moe_layers,
    create_upcycling_pre_wrap_hook,
)


def _config(**changes):
    return UpcyclingConfig(**({"hf_model_path": "org/dense", "num_experts": 8, "top_k": 2} | changes))


def _provider(**changes):
    return GPTModelProvider(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=128, **changes)


def _registry(*mappings):
    dense = MegatronMappingRegistry(
        AutoMapping("decoder.layers.*.mlp.linear_fc1.layer_norm_weight", "layers.*.norm.weight"),
        AutoMapping("decoder.layers.*.mlp.linear_fc1.bias", "layers.*.up.bias"),
        AutoMapping("decoder.layers.*.mlp.linear_fc2.weight", "layers.*.down.weight", permute_dims=(1, 0)),
        GatedMLPMapping("decoder.layers.*.mlp.linear_fc1.weight", "layers.*.gate.weight", "layers.*.up.weight"),
        *mappings,
    )
    return UpcyclingMappingRegistry(dense, router_seed=1, router_init_std=0.5)


class TestUpcyclingConfig:
    """Test cases for what the config does to a model config, and what it refuses."""

    def test_dense_model_gets_experts(self):
        provider = _provider()
        _config().setup(provider)
        _config().setup(provider)  # as for a resumed run, whose config has them
        provider.finalize()
        assert (provider.num_moe_experts, provider.moe_router_topk, provider.moe_ffn_hidden_size) == (8, 2, 128)

    def test_builder_backed_config_gets_experts(self):
        model_config = SimpleNamespace(transformer=_provider())
        _config().setup(model_config)
        assert model_config.transformer.num_moe_experts == 8

    @pytest.mark.parametrize("top_k", [0, 9])
    def test_top_k_has_to_fit(self, top_k):
        with pytest.raises(ValueError, match="top_k must be between 1 and num_experts"):
            _config(top_k=top_k).setup(_provider())

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_moe_experts": 4},
            {"moe_ffn_hidden_size": 64},
            {"moe_shared_expert_intermediate_size": 128},
            {"init_model_with_meta_device": True},
        ],
        ids=str,
    )
    def test_model_that_copies_cannot_fill_is_refused(self, changes):
        with pytest.raises(ValueError, match=f"model.{next(iter(changes))}"):
            _config().setup(_provider(**changes))

    @pytest.mark.parametrize(("scaling_factor", "warns"), [(None, True), (4.0, False)])
    def test_router_that_scales_outputs_is_warned_of(self, scaling_factor, warns):
        provider = _provider(moe_router_pre_softmax=True, moe_router_topk_scaling_factor=scaling_factor)
        with patch("megatron.bridge.training.upcycling.warn_rank_0") as warn:
            _config().setup(provider)
        assert warn.called == warns

    def test_resume_keeps_the_saved_config(self):
        saved = ConfigContainer._convert_value_to_dict(_config())
        _config().verify_resume({"upcycling": saved})
        with pytest.raises(ValueError, match=r"top_k from 2 to 4.*router_seed from 1234 to 5"):
            _config(top_k=4, router_seed=5).verify_resume({"upcycling": saved})

    @pytest.mark.parametrize("run_config", [{}, {"upcycling": None}])
    def test_resume_from_a_run_that_was_not_upcycled_is_refused(self, run_config):
        with pytest.raises(ValueError, match="not of an upcycled run"):
            _config().verify_resume(run_config)


class TestUpcyclingMappingRegistry:
    """Test cases for the mappings of experts and routers."""

    @pytest.mark.parametrize("experts", ["experts.linear_fc1.weight5", "experts.local_experts.5.linear_fc1.weight"])
    def test_expert_has_the_source_of_the_dense_network(self, experts):
        mapping = _registry().megatron_to_hf_lookup(f"decoder.layers.3.mlp.{experts}")
        assert type(mapping) is GatedMLPMapping
        assert mapping.is_expert
        assert mapping.hf_param == {"gate": "layers.3.gate.weight", "up": "layers.3.up.weight"}

    @pytest.mark.parametrize(
        ("name", "hf_param", "permute_dims"),
        [("linear_fc2.weight0", "layers.3.down.weight", (1, 0)), ("linear_fc1.bias7", "layers.3.up.bias", None)],
    )
    def test_plain_mapping_keeps_its_permutation(self, name, hf_param, permute_dims):
        mapping = _registry().megatron_to_hf_lookup(f"decoder.layers.3.mlp.experts.{name}")
        assert (mapping.hf_param, mapping.permute_dims) == (hf_param, permute_dims)

    def test_everything_else_is_mapped_as_in_the_dense_model(self):
        mapping = _registry().megatron_to_hf_lookup("decoder.layers.3.pre_mlp_layernorm.weight")
        assert (mapping.hf_param, mapping.is_expert) == ("layers.3.norm.weight", False)
        assert _registry().megatron_to_hf_lookup("decoder.layers.3.mlp.shared_experts.linear_fc1.weight") is None

    def test_other_mapping_of_a_network_is_refused(self):
        registry = _registry(ConcatenatedQKVMapping("x.layers.*.mlp.linear_fc1.weight", "layers.*.fused"))
        with pytest.raises(ValueError, match=r"ConcatenatedQKVMapping of x.layers.0.mlp.linear_fc1.weight"):
            registry.megatron_to_hf_lookup("x.layers.0.mlp.experts.linear_fc1.weight0")

    def test_router_depends_on_seed_and_layer_alone(self):
        router = SimpleNamespace(weight=torch.empty(8, 64), expert_bias=torch.empty(8))

        def draw(layer, name="weight"):
            mapping = _registry().megatron_to_hf_lookup(f"decoder.layers.{layer}.mlp.router.{name}")
            assert isinstance(mapping, ReplicatedMapping)
            return mapping.hf_to_megatron({}, router)

        assert torch.equal(draw(0), draw(0))
        assert not torch.equal(draw(0), draw(1))
        assert abs(draw(0).std() - 0.5) < 0.05
        assert not draw(0, "expert_bias").any()


@pytest.mark.parametrize(
    ("frequency", "routed", "is_refused"),
    [(1, [0, 1], False), ([0, 1], [1], False), ([0, 1], [0, 1], True), (1, [], True)],
)
def test_layers_without_the_experts_asked_for_are_refused(frequency, routed, is_refused):
    names = [f"decoder.layers.{layer}.mlp.router.weight" for layer in routed] + ["mtp.layers.0.mlp.router.weight"]
    tasks = [SimpleNamespace(global_param_name=name) for name in names]
    if is_refused:
        with pytest.raises(ValueError, match="moe_layer_freq asks for"):
            _verify_moe_layers(tasks, num_layers=2, frequency=frequency)
    else:
        _verify_moe_layers(tasks, num_layers=2, frequency=frequency)


class TestPreWrapHook:
    """Test cases for the guard of a resumed run."""

    def test_new_run_is_upcycled(self):
        config, model = _config(), [Mock()]
        with patch("megatron.bridge.training.upcycling.upcycle") as upcycle:
            assert create_upcycling_pre_wrap_hook(config, Mock(), lambda: False)(model) is upcycle.return_value
        upcycle.assert_called_once_with(config, model)

    @pytest.mark.parametrize("is_direct", [False, True])
    @pytest.mark.parametrize(("saved", "is_refused"), [("top_k: 2", False), ("top_k: 1", True), (None, True)])
    def test_resumed_run_is_compared_and_not_upcycled(self, tmp_path, saved, is_refused, is_direct):
        iteration = tmp_path / "iter_0000005"
        iteration.mkdir()
        spec = f"upcycling: {{hf_model_path: org/dense, num_experts: 8, {saved}, router_seed: 1234}}"
        (iteration / "run_config.yaml").write_text(spec if saved else "upcycling: null")
        checkpoint = SimpleNamespace(load=str(iteration if is_direct else tmp_path), ckpt_step=None)
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
        hook = create_upcycling_pre_wrap_hook(_config(), checkpoint, lambda: True)
        model = [Mock()]
        with patch("megatron.bridge.training.upcycling.upcycle") as upcycle:
            if is_refused:
                with pytest.raises(ValueError, match=r"checkpoint\.load"):
                    hook(model)
            else:
                assert hook(model) is model
        upcycle.assert_not_called()

    def test_non_persistent_checkpoint_has_nothing_to_compare(self, tmp_path):
        checkpoint = SimpleNamespace(load=str(tmp_path), ckpt_step=None)
        hook = create_upcycling_pre_wrap_hook(_config(), checkpoint, lambda: True)
        assert hook(["chunk"]) == ["chunk"]
