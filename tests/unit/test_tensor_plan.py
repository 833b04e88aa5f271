"""The record of what a tensor is made of, carried out on a part of one."""

from __future__ import annotations

from pathlib import Path

import torch

from nemo_upcycle import UpcycleSpec, open_dense
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.models.sharding import Shard
from nemo_upcycle.tensor_plan import change_copies, plan_tensor


def test_a_method_that_changes_nothing_reads_nothing(dense: Path) -> None:
    spec = UpcycleSpec(num_experts=4, top_k=2, method="noise", noise_std=0.0)
    with open_dense(dense) as source:
        arch, moe_arch = source.architecture, source.architecture.upcycled(spec)
        plan = plan_tensor(mapping_of("expert_fc2", moe_arch), 0, 3, arch, moe_arch, spec, shard=Shard(1, 2))
        (slice_,) = plan.slices
        part = source.read(slice_.name, slice_.bounds)
        before, bytes_before = part.clone(), source.bytes_read
        change_copies(plan, spec, source, [3], [part])
        assert source.bytes_read == bytes_before
    assert torch.equal(part, before)
