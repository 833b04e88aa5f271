"""Training data: blends of texts, the engine that tokenises them, and the datasets that training reads."""

from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


need_no_cuda_to_import()
