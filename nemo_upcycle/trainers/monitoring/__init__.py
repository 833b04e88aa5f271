"""Router health, FLOPs and throughput, independent of the trainer."""

from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


need_no_cuda_to_import()
