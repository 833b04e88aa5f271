"""The trainers: `base.py` defines the interface of a training, which `nemo/` and `bridge/` implement."""

from nemo_upcycle.utils.megatron_import import need_no_cuda_to_import


need_no_cuda_to_import()
