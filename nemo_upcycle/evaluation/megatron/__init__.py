"""Evaluate a Megatron model as it is trained: a checkpoint under any layout, or the live model of a training job."""

from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


need_no_cuda_to_import()
