"""Ranks of a simulated cluster: Megatron's own modules on the meta device, under a fake process group.

Nothing is computed or allocated, so one CPU core can simulate any of thousands of ranks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.layer_settings import decoder_settings
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.parameters import OPTIMIZER_BYTES
from nemo_upcycle.utils.attributes import temporarily_set
from tests.models import PARALLEL


#: Ways to build a rank with real Transformer Engine modules, in BF16 and in FP8, besides Megatron's local spec.
TRANSFORMER_ENGINE = ("bf16", "delayed", "tensorwise", "blockwise")


def allocated_bytes(chunks: list[Any], gradients: str) -> tuple[int, int, int]:
    """Count the bytes of weights, gradients and optimizer states that Megatron-Core's wrapper allocates on a rank.

    Args:
        chunks: model chunks of the rank, from `build_rank`; this function converts them to BF16.
        gradients: precision in which gradients are summed, fp32 or bf16.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradients == "fp32", overlap_grad_reduce=True, use_distributed_optimizer=True
    )
    weights = summed = owned = 0
    with temporarily_set(torch.cuda, "current_device", lambda: torch.device("meta")):
        for number, chunk in enumerate(chunks):
            wrapped: Any = DistributedDataParallel(
                chunk.config, settings, chunk.bfloat16(), disable_bucketing=number > 0
            )
            for buffer in [*wrapped.buffers, *wrapped.expert_parallel_buffers]:
                weights += buffer.param_data.nbytes
                summed += buffer.grad_data.nbytes
                for shards in DistributedOptimizer._build_gbuf_range_map(buffer).values():
                    owned += sum(part["param"].size for shard in shards for part in shard["param_map"].values())
    return weights, summed, OPTIMIZER_BYTES * owned


class GroupRanks(NamedTuple):
    """A rank's position in the groups of the dense part (tp, cp, dp, pp) and of the experts (etp, ep, expert_dp)."""

    tp: int
    cp: int
    dp: int
    pp: int
    etp: int
    ep: int
    expert_dp: int


def group_ranks(layout: Layout, rank: int) -> GroupRanks:
    """Return a rank's position in each of its groups, in Megatron's order."""
    tp, rest = rank % layout.tp, rank // layout.tp
    cp, rest = rest % layout.cp, rest // layout.cp
    dp, pp = rest % layout.dp, rest // layout.dp
    etp, rest = rank % layout.etp, rank // layout.etp
    ep, rest = rest % layout.ep, rest // layout.ep
    return GroupRanks(tp, cp, dp, pp, etp, ep, rest % layout.expert_dp)


def build_rank(arch: Architecture, layout: Layout, engine: str | None = None) -> list[Any]:
    """Build the model chunks of the rank that this process simulates. Each is a `GPTModel` on the meta device.

    Args:
        arch: shapes of the model.
        layout: layout of the cluster.
        engine: an entry of `TRANSFORMER_ENGINE`, or None for Megatron's own modules.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.models.gpt import GPTModel

    from nemo_upcycle.online.decoder_layers import decoder_layers

    config = transformer_config(arch, layout)
    if engine is not None:
        fp8 = {} if engine == "bf16" else {"fp8": "hybrid", "fp8_recipe": engine}
        grouped = bool(arch.num_experts)
        meta = {"use_cpu_initialization": False, "init_model_with_meta_device": True}
        cut = {"sequence_parallel": layout.tp > 1, "context_parallel_size": layout.cp}
        config = replace(config, moe_grouped_gemm=grouped, **cut, **meta, **fp8)
    # Megatron's routers create biases on the current device. Only Transformer Engine's modules need a real device.
    current_device = (lambda: torch.device("meta")) if engine is None else torch.cuda.current_device
    chunks = []
    for number, parts in enumerate(layout.chunks(arch, ps.get_pipeline_model_parallel_rank())):
        stage = number if layout.vp > 1 else None
        block = decoder_layers(config, engine is not None, stage, **decoder_settings(arch))
        # Keep tied embeddings on meta. Megatron would move them to the GPU, to make the first and last stage equal.
        with (
            torch.device("meta"),
            temporarily_set(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor),
            temporarily_set(torch.cuda, "current_device", current_device),
        ):
            chunks.append(
                GPTModel(
                    config,
                    block,
                    layout.padded_vocab(arch),
                    arch.max_positions,
                    pre_process=parts.has_embedding,
                    post_process=parts.has_output,
                    share_embeddings_and_output_weights=arch.tied_embeddings,
                    position_embedding_type="rope",
                    vp_stage=stage,
                )
            )
    return chunks


def transformer_config(arch: Architecture, layout: Layout) -> Any:
    """Return Megatron's configuration of a model under a layout. The model's weights will not be initialised."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    # The all-gather dispatcher needs no CUDA stream.
    dispatcher = {"moe_token_dispatcher_type": "allgather"} if arch.num_experts else {}
    config = TransformerConfig(
        **megatron_fields(arch),
        **dispatcher,
        activation_func=torch.nn.functional.silu if arch.activation == "silu" else torch.nn.functional.gelu,
        bias_activation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.bfloat16,
        bf16=True,
        pipeline_dtype=torch.bfloat16,
        **{setting: getattr(layout, name) for name, setting in PARALLEL.items() if name != "vp"},
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        num_layers_in_first_pipeline_stage=layout.first,
        num_layers_in_last_pipeline_stage=layout.last,
        account_for_embedding_in_pipeline_split=bool(layout.embedding),
        account_for_loss_in_pipeline_split=bool(layout.loss),
        sequence_parallel=layout.tp > 1,
    )
    # These three settings change no shape, and the norm and attention of the local spec refuse them.
    config.sequence_parallel, config.context_parallel_size, config.layernorm_zero_centered_gamma = False, 1, False
    return config
