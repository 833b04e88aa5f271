"""An overlapped gather of MXFP8 parameters is refused: NeMo 2.7 would gather the parameters before they exist."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
from megatron.core.distributed import DistributedDataParallelConfig

from nemo_upcycle.errors import SpecError


@pytest.mark.parametrize(
    ("reuse", "overlap", "refused"), [(True, True, True), (True, False, False), (False, True, False)]
)
def test_parameters_in_mxfp8_are_not_gathered_while_others_compute(reuse: bool, overlap: bool, refused: bool) -> None:
    from nemo_upcycle.trainers.nemo.upcycling import _check_gather

    ddp = DistributedDataParallelConfig(
        overlap_grad_reduce=True,
        overlap_param_gather=overlap,
        use_distributed_optimizer=True,
        fp8_param_gather=True,
        reuse_grad_buf_for_mxfp8_param_ag=reuse,
    )
    with pytest.raises(SpecError, match=r"ddp\.overlap_param_gather is True") if refused else nullcontext():
        _check_gather(ddp)
    _check_gather("megatron")
