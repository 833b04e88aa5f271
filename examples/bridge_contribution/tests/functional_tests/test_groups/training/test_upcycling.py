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

"""Functional tests of upcycling: a dense checkpoint is upcycled, trained, saved and resumed."""

import os

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron.bridge import AutoBridge
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.config import (
    CheckpointConfig,
    ConfigContainer,
    DistributedDataParallelConfig,
    LoggerConfig,
    MockGPTDatasetConfig,
    OptimizerConfig,
    RNGConfig,
    SchedulerConfig,
    TokenizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.upcycling import UpcyclingConfig
from tests.functional_tests.utils import (
    broadcast_path,
    clear_directories,
    initialize_distributed,
    verify_checkpoint_files,
)


SEQ_LENGTH = 512
VOCAB_SIZE = 1024
LAYOUTS = [
    {"expert_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    {"pipeline_model_parallel_size": 2, "pipeline_dtype": torch.bfloat16},
]


class _FirstLoss(Callback):
    """Keeps the loss of the first step."""

    def __init__(self):
        self.loss = None

    def on_train_step_end(self, context):
        if self.loss is None and context.loss_dict:
            self.loss = context.loss_dict["lm loss"].item()


def _write_dense(path):
    if torch.distributed.get_rank() == 0:
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=SEQ_LENGTH,
        )
        LlamaForCausalLM(config).save_pretrained(path)
    torch.distributed.barrier()


def _config(dense, upcycling, *, checkpoint=None, train_iters=1, layout):
    model = AutoBridge.from_hf_pretrained(dense).to_megatron_provider(load_weights=upcycling is None)
    settings = {
        "seq_length": SEQ_LENGTH,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
    }
    if upcycling is None:
        layout = {name: value for name, value in layout.items() if not name.startswith("expert_")}
    for name, value in (settings | layout).items():
        if not hasattr(model, name):
            raise ValueError(f"Config has no field '{name}'")
        setattr(model, name, value)
    return ConfigContainer(
        model=model,
        upcycling=upcycling,
        train=TrainingConfig(train_iters=train_iters, global_batch_size=4, micro_batch_size=1),
        validation=ValidationConfig(eval_iters=0),
        optimizer=OptimizerConfig(
            optimizer="adam", bf16=True, fp16=False, use_distributed_optimizer=True, lr=1e-4, min_lr=1e-5
        ),
        scheduler=SchedulerConfig(
            start_weight_decay=0.01,
            end_weight_decay=0.01,
            weight_decay_incr_style="constant",
            lr_decay_style="cosine",
            lr_warmup_iters=0,
            lr_decay_iters=4,
            override_opt_param_scheduler=True,
        ),
        ddp=DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
        dataset=MockGPTDatasetConfig(
            random_seed=1234,
            reset_attention_mask=False,
            reset_position_ids=False,
            eod_mask_loss=False,
            seq_length=SEQ_LENGTH,
            num_dataset_builder_threads=1,
            data_sharding=True,
            dataloader_type="single",
            num_workers=1,
        ),
        logger=LoggerConfig(log_interval=1),
        tokenizer=TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=VOCAB_SIZE - 1),
        checkpoint=CheckpointConfig(save=checkpoint, load=checkpoint, save_interval=2, ckpt_format="torch_dist"),
        rng=RNGConfig(seed=1234),
    )


def _first_loss(config):
    callback = _FirstLoss()
    pretrain(config, forward_step, callbacks=[callback])
    losses = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(losses, callback.loss)
    return next(loss for loss in losses if loss is not None)


class TestUpcycling:
    """Test upcycling on two GPUs."""

    @pytest.mark.run_only_on("GPU")
    def test_upcycled_run_is_saved_and_resumed(self, tmp_path):
        initialize_distributed()
        shared = broadcast_path(tmp_path)
        dense, checkpoint = os.path.join(shared, "dense"), os.path.join(shared, "checkpoints")
        _write_dense(dense)
        try:
            upcycling = UpcyclingConfig(hf_model_path=dense, num_experts=4, top_k=2)
            pretrain(_config(dense, upcycling, checkpoint=checkpoint, train_iters=2, layout=LAYOUTS[0]), forward_step)
            verify_checkpoint_files(checkpoint, 2, ckpt_format="torch_dist")
            pretrain(_config(dense, upcycling, checkpoint=checkpoint, train_iters=4, layout=LAYOUTS[0]), forward_step)
            verify_checkpoint_files(checkpoint, 4, ckpt_format="torch_dist")
            changed = UpcyclingConfig(hf_model_path=dense, num_experts=4, top_k=1)
            with pytest.raises(ValueError, match="top_k from 2 to 1"):
                pretrain(
                    _config(dense, changed, checkpoint=checkpoint, train_iters=4, layout=LAYOUTS[0]), forward_step
                )
        finally:
            clear_directories(shared)

    @pytest.mark.run_only_on("GPU")
    @pytest.mark.parametrize("layout", LAYOUTS, ids=["EP2", "TP2", "PP2"])
    def test_first_loss_is_the_dense_models(self, tmp_path, layout):
        initialize_distributed()
        shared = broadcast_path(tmp_path)
        dense = os.path.join(shared, "dense")
        _write_dense(dense)
        try:
            upcycling = UpcyclingConfig(hf_model_path=dense, num_experts=4, top_k=2)
            loss = _first_loss(_config(dense, upcycling, layout=layout))
            assert loss == pytest.approx(_first_loss(_config(dense, None, layout=layout)), rel=1e-3)
        finally:
            clear_directories(shared)
