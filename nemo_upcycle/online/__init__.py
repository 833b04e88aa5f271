"""Online upcycling: fill the Megatron chunks of a rank from a dense checkpoint."""

from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


need_no_cuda_to_import()
