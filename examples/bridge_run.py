"""Upcycle a dense checkpoint in a Megatron-Bridge run, with Bridge's own `pretrain`.

    torchrun --nproc-per-node 8 examples/bridge_run.py /models/Qwen3-0.6B /runs/mine model.expert_model_parallel_size=8

The words after the two folders are settings, as in Bridge's own scripts. The run trains on Bridge's mock data. If the
folder has a checkpoint, the run resumes from it. `nemo-upcycle export /runs/mine hf/` turns the checkpoint into a
Hugging Face folder. The script needs an environment with Megatron-Bridge (docs/bridge.md).
"""

import sys

# Import nemo_upcycle before Megatron: without it, Megatron's import fails on a machine with CUDA but no GPU.
from nemo_upcycle import UpcycleSpec
from nemo_upcycle.bridge import upcycled_pretraining
from nemo_upcycle.cpu.backend import use_cpu_backend


# isort: split
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides


def main(dense: str, folder: str, *settings: str) -> None:
    """Train the upcycled model.

    Args:
        dense: Hugging Face folder of the dense checkpoint.
        folder: folder for checkpoints and the receipt.
        settings: settings of Bridge's configuration (`KEY=VALUE`).
    """
    use_cpu_backend()  # does nothing if there is a GPU
    config = upcycled_pretraining(dense, UpcycleSpec(num_experts=8, top_k=2), seq_length=512)
    config.checkpoint.save = config.checkpoint.load = folder
    config.train.train_iters, config.train.global_batch_size, config.train.micro_batch_size = 100, 8, 1
    config.scheduler.lr_warmup_iters = 5
    pretrain(process_config_with_overrides(config, cli_overrides=list(settings)), forward_step)


if __name__ == "__main__":
    main(*sys.argv[1:])
