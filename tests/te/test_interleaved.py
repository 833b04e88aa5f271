"""Experts with interleaved gate and up rows have the same rows in another order, also in Bridge's checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_upcycle import upcycle_into
from nemo_upcycle.cpu.one_rank import megatron_rank
from nemo_upcycle.errors import SpecError
from nemo_upcycle.planning.layout import Layout
from tests.models import MemorySource, small_architecture
from tests.te.test_upcycle import LAYOUTS, ONE_RANK, SPEC, _filled, _local, _with_te, kind_of


SIZE = 8
INTERLEAVED = {"moe_mlp_glu_interleave_size": SIZE}


@pytest.fixture(scope="module", autouse=True)
def _megatron_interleaves(_cuda_seems_to_be_there: None) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(TransformerConfig, "moe_mlp_glu_interleave_size"):
        pytest.skip("this Megatron-Core interleaves nothing: `make test-in ENV=bridge` has one that does")


def _apart(interleaved: torch.Tensor) -> torch.Tensor:
    """Return the gate rows above the up rows. Megatron's function for this expects outputs [tokens, 2 F]."""
    from megatron.core.transformer.moe.experts import TEGroupedMLP

    columns = interleaved.reshape(interleaved.shape[0], -1).T
    return TEGroupedMLP._remove_glu_interleaving(columns, SIZE).T.reshape(interleaved.shape)


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        *(("tied", layout) for layout in LAYOUTS),
        *((model, Layout(gpus=4, tp=2, pp=2, ep=2)) for model in ("biases", "noise", "drop", "granular")),
        *((model, Layout(gpus=4, tp=2, ep=2, etp=2)) for model in ("noise", "drop", "granular")),
    ],
    ids=str,
)
def test_a_rank_has_the_same_rows_in_another_order(model: str, layout: Layout) -> None:
    arch, spec = kind_of(model)
    source = MemorySource(arch)
    for rank in range(layout.gpus):
        with megatron_rank(layout, rank):
            local, grouped = _local(arch, spec, layout), {"moe_grouped_gemm": True}
            wanted = _filled(_with_te(local, **grouped), source, spec)
            got = _filled(_with_te(local, **grouped, **INTERLEAVED), source, spec)
        for key, parameter in got.items():
            turns = key[0] in ("expert_fc1", "expert_fc1_bias")
            assert torch.equal(_apart(parameter) if turns else parameter, wanted[key]), f"rank {rank}: {key}"
            assert not turns or not torch.equal(parameter, wanted[key])


def test_shared_experts_take_turns_where_their_own_setting_says_so() -> None:
    checkpointing = pytest.importorskip("megatron.bridge.training.checkpointing")
    arch, spec = kind_of("shared")
    shared = {"use_grouped_gemm_for_shared_expert": True, "moe_shared_expert_glu_interleave_size": SIZE}
    with megatron_rank(ONE_RANK, 0):
        local, source = _local(arch, spec, ONE_RANK), MemorySource(arch)
        wanted = _filled(_with_te(local, moe_grouped_gemm=True), source, spec)
        got = _filled(_with_te(local, moe_grouped_gemm=True, **shared), source, spec)
    for key, parameter in got.items():
        order = checkpointing._interleave_glu_tensor if key[0] == "shared_fc1" else lambda tensor, size: tensor
        assert torch.equal(parameter, order(wanted[key], SIZE)), key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"moe_grouped_gemm": False}, "none without model.config.moe_grouped_gemm"),
        ({"moe_mlp_glu_interleave_size": 5}, "a divisor of 96 neurons"),
        ({"moe_shared_expert_glu_interleave_size": 8}, "none without model.config.use_grouped_gemm_for_shared_expert"),
    ],
)
def test_what_no_module_reads_so_is_refused(changes: dict[str, Any], words: str) -> None:
    arch = small_architecture()
    with megatron_rank(ONE_RANK, 0):
        chunks = _with_te(_local(arch, SPEC, ONE_RANK), **({"moe_grouped_gemm": True} | INTERLEAVED | changes))
        with pytest.raises(SpecError, match=words):
            upcycle_into(chunks, MemorySource(arch), SPEC)


@pytest.mark.parametrize("layout", [ONE_RANK, Layout(gpus=2, etp=2)], ids=str)
def test_bridge_saves_gate_above_up_and_loads_them_taking_turns(layout: Layout) -> None:
    """Save and load as Bridge's `save_checkpoint` and `load_checkpoint` do, with Megatron's own factories inside."""
    checkpointing = pytest.importorskip("megatron.bridge.training.checkpointing")
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    from nemo_upcycle.trainers.bridge.interleaving import store_contiguous

    arch, state = small_architecture(), {}
    for changes in ({}, INTERLEAVED):
        with megatron_rank(layout, layout.gpus - 1):
            (chunk,) = _with_te(_local(arch, SPEC, layout), moe_grouped_gemm=True, **changes)
            upcycle_into([chunk], MemorySource(arch), SPEC)
            state[bool(changes)] = chunk.sharded_state_dict()
    with pytest.MonkeyPatch.context() as patch:
        name = "_process_state_dict_for_glu_interleaving"
        patch.setattr(checkpointing, name, getattr(checkpointing, name))
        store_contiguous()
        store_contiguous()
        saved = checkpointing._process_state_dict_for_model_glu_interleaving(state[True], SIZE, None, interleave=False)
        factories = {key: value for key, value in saved.items() if isinstance(value, ShardedTensorFactory)}
        assert len(factories) == 2 * 4  # fc1 of the experts in two layers
        for key, factory in factories.items():
            wanted = state[False][key].build()
            for shard, same in zip(factory.build(), wanted, strict=True):
                assert torch.equal(shard.data, same.data)
                assert shard.global_offset == same.global_offset
        loaded = {key: factory.data for key, factory in factories.items()}
        loaded = checkpointing._process_state_dict_for_model_glu_interleaving(loaded, SIZE, None)
        assert all(torch.equal(loaded[key], state[True][key].data) for key in factories)
