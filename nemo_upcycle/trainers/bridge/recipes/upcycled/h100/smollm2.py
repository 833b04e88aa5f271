"""SmolLM2-135M upcycled to 8 experts, top-2, and its dense baseline: real models that need one GPU, or none."""

from __future__ import annotations

from megatron.bridge.training.config import ConfigContainer

from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.bridge.recipes.common import upcycled_pretraining


def smollm2_135m_e8t2_pretrain_1gpu_h100_bf16_config() -> ConfigContainer:
    """Return a training of the upcycled SmolLM2-135M, whose weights come with this package's assets."""
    return _small(UpcycleSpec(num_experts=8, top_k=2))


def smollm2_135m_dense_ct_pretrain_1gpu_h100_bf16_config() -> ConfigContainer:
    """Return a training of SmolLM2-135M as it is: the baseline that the upcycled model has to beat."""
    return _small(None)


def _small(spec: UpcycleSpec | None) -> ConfigContainer:
    config = upcycled_pretraining("asset://smollm2-135m", spec, seq_length=512)
    config.train.global_batch_size, config.train.micro_batch_size = 8, 1
    config.train.train_iters = 100
    config.validation.eval_interval, config.validation.eval_iters = 50, 4
    config.checkpoint.save_interval = 50
    config.optimizer.lr, config.optimizer.min_lr = 1e-4, 1e-5
    config.scheduler.lr_warmup_iters = 5
    return config
