"""The CPU backend, which lets stock NeMo and Megatron run without CUDA."""

from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


need_no_cuda_to_import()
