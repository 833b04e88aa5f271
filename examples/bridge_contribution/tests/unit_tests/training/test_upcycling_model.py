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

"""Upcycling of small models on CPUs, with gloo: what every rank holds, and what the model computes."""

import os
import socket
from contextlib import contextmanager, nullcontext
from functools import partial
from unittest.mock import patch

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.models.hf_pretrained.state import StateDict
from megatron.bridge.training.upcycling import UpcyclingConfig, upcycle


LAYOUTS = [
    {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
]


def _write_dense(folder, *, tie_word_embeddings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tie_word_embeddings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def _layers(config, vp_stage=None):
    return get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization=config.normalization, vp_stage=vp_stage
    )


@contextmanager
def _model_parallel(**layout):
    """Set up Megatron's groups without CUDA, and its random states as models on CPUs need them."""
    parallel_state.initialize_model_parallel(**layout)
    try:
        with (
            patch("torch.cuda.current_device", return_value="cpu"),
            patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
            patch.object(CudaRNGStatesTracker, "fork", lambda *_: nullcontext()),
        ):
            yield
    finally:
        parallel_state.destroy_model_parallel()


def _build(dense, upcycling, *, moe_layer_freq=1, **layout):
    """Build a model of Megatron's own layers: the dense one by Bridge's loader, or the upcycled one."""
    provider = AutoBridge.from_hf_pretrained(dense).to_megatron_provider(load_weights=upcycling is None)
    settings = {
        "transformer_layer_spec": _layers,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "bf16": False,
        "fp16": False,
        "moe_router_dtype": "fp64",
        "moe_layer_freq": moe_layer_freq,
        "persist_layer_norm": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
    }
    if upcycling is None:
        layout = {name: size for name, size in layout.items() if not name.startswith("expert_")}
    for name, value in (settings | layout).items():
        assert hasattr(provider, name), name
        setattr(provider, name, value)
    if upcycling is not None:
        upcycling.setup(provider)
        provider.register_pre_wrap_hook(partial(upcycle, upcycling))
    provider.finalize()
    return provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)


def _compare(model, dense):
    """Compare with the dense model of the same rank, and return the routers by their layer."""
    routers = {}
    sources = dict(dense[0].named_parameters())
    for name, parameter in model[0].named_parameters():
        if ".router." in name:
            layer = model[0].decoder.layers[int(name.split(".")[2])].layer_number
            routers[layer] = parameter.detach().clone()
            continue
        source = name.split(".local_experts.")
        if len(source) == 2:
            name = source[0].removesuffix(".experts") + "." + source[1].partition(".")[2]
        assert torch.equal(parameter, sources[name]), name
    return routers


def _init_process_group(rank, world_size, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)


def _free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def _fill_on_rank(rank, port, dense, config, expected):
    _init_process_group(rank, 2, port)
    for layout in LAYOUTS:
        with _model_parallel(**layout):
            routers = _compare(_build(dense, config, **layout), _build(dense, None, **layout))
        assert routers, layout
        assert all(torch.equal(router, expected[layer]) for layer, router in routers.items()), layout
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank():
    if torch.distributed.is_initialized():
        pytest.skip("needs a process group of its own")
    _init_process_group(0, 1, _free_port())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
class TestUpcycledModel:
    """Test cases for the upcycled model of one rank."""

    @pytest.mark.parametrize("tie_word_embeddings", [False, True])
    def test_starts_as_the_dense_model(self, tmp_path, tie_word_embeddings):
        dense = _write_dense(tmp_path, tie_word_embeddings=tie_word_embeddings)
        tokens = torch.arange(16)[None]
        mask = torch.ones(1, 1, 16, 16).tril() < 0.5
        with _model_parallel(), torch.no_grad():
            model = _build(dense, UpcyclingConfig(hf_model_path=dense, num_experts=4, top_k=2))
            _compare(model, _build(dense, None))
            logits = model[0].eval()(tokens, tokens, mask)
        torch.testing.assert_close(logits, LlamaForCausalLM.from_pretrained(dense)(tokens).logits.detach())

    def test_each_dense_tensor_is_read_once(self, tmp_path):
        dense = _write_dense(tmp_path, tie_word_embeddings=False)
        read = []
        original = StateDict.__getitem__

        def getitem(state, key):
            read.append(key)
            return original(state, key)

        with _model_parallel(), patch.object(StateDict, "__getitem__", getitem):
            _build(dense, UpcyclingConfig(hf_model_path=dense, num_experts=4, top_k=2))
        assert sorted(read) == sorted(LlamaForCausalLM.from_pretrained(dense).state_dict())

    def test_layers_that_stay_dense(self, tmp_path):
        dense = _write_dense(tmp_path, tie_word_embeddings=False)
        with _model_parallel():
            model = _build(dense, UpcyclingConfig(hf_model_path=dense, num_experts=4, top_k=2), moe_layer_freq=[0, 1])
            assert list(_compare(model, _build(dense, None))) == [2]

    def test_model_of_another_architecture_is_refused(self, tmp_path):
        dense = _write_dense(tmp_path, tie_word_embeddings=False)
        with _model_parallel(), pytest.raises(ValueError, match=r"model.layernorm_epsilon is 0.5, but 1e-06"):
            _build(dense, UpcyclingConfig(hf_model_path=dense, num_experts=4, top_k=2), layernorm_epsilon=0.5)


def test_every_layout_holds_the_same_model(tmp_path, one_rank):
    dense = _write_dense(tmp_path, tie_word_embeddings=True)
    config = UpcyclingConfig(hf_model_path=dense, num_experts=4, top_k=2, router_seed=7)
    with _model_parallel():
        expected = _compare(_build(dense, config), _build(dense, None))
    torch.multiprocessing.spawn(_fill_on_rank, (_free_port(), dense, config, expected), nprocs=2)
