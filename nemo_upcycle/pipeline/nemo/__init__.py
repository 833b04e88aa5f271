"""The commands for NeMo's recipes."""

from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


need_no_cuda_to_import()
