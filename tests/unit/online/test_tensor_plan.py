"""A tensor's plan, executed on a part of the tensor."""

from __future__ import annotations

from dataclasses import replace

import torch

from nemo_upcycle import UpcycleSpec
from nemo_upcycle.models.mapping import mapping_of
from nemo_upcycle.models.sharding import Shard
from nemo_upcycle.online.tensor_plan import ModelPlan
from tests.models import MemorySource, small_architecture


def test_slices_of_fused_matrices_equal_separate_ones() -> None:
    spec = UpcycleSpec(num_experts=8, top_k=4, granularity=2)
    llama = MemorySource(small_architecture())
    arch = replace(llama.architecture, hf_class="Phi3ForCausalLM")
    moe_arch = arch.upcycled(spec)
    tensors = {}
    for role in ("qkv", "fc1"):
        parts = [name.format(layer=1) for name in mapping_of(role, llama.architecture).hf]
        tensors[mapping_of(role, arch).hf[0].format(layer=1)] = torch.cat([llama.tensors[name] for name in parts])
    for role in ("qkv", "expert_fc1"):
        for rank in range(2):
            mapping = mapping_of(role, moe_arch)
            plans = [
                ModelPlan(dense, moe_arch, spec).tensor(mapping, 1, 3, shard=Shard(rank, 2))
                for dense in (llama.architecture, arch)
            ]
            assert len(plans[1].slices) == len(mapping.parts)
            for plain, fused in zip(*(plan.slices for plan in plans), strict=True):
                index = tuple(slice(*bounds) for bounds in fused.bounds)
                assert torch.equal(tensors[fused.name][index], llama.read(plain.name, plain.bounds))
