"""Load the weights of a NeMo or Megatron checkpoint, without the optimizer, into a model of any layout."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nemo_upcycle.convert.megatron_weights import CheckpointWeights, open_checkpoint
from nemo_upcycle.cpu.backend import use_cpu_backend
from nemo_upcycle.errors import CheckpointError
from nemo_upcycle.models.activation import activation_function
from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.balancing import QUANTILES, check_balancing
from nemo_upcycle.models.layer_settings import decoder_settings, window_fields
from nemo_upcycle.models.mapping import find_mapping, mapping_of, stored_as
from nemo_upcycle.models.mapping_table import BY_ROLE, ParamMapping
from nemo_upcycle.models.megatron_config import check_model, megatron_fields
from nemo_upcycle.models.rotary import turn_as
from nemo_upcycle.models.sharding import Shard, hf_parts, source_slices
from nemo_upcycle.online.plan import RankCoords, split_name
from nemo_upcycle.planning import rules
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.progress import ProgressLine


_BALANCING_BIASES = tuple(name for role in BALANCING_BIASES for name in BY_ROLE[role].megatron)


def layout_here(*, tp: int = 1, pp: int = 1, vp: int = 1, ep: int = 1) -> Layout:
    """Return the layout of this job's ranks, whose number torchrun sets; ranks beyond the given sizes are replicas.

    Args:
        tp: number of ranks that share every matrix; if `ep` is above 1, experts stay whole.
        pp: number of ranks that share the layers.
        vp: number of pieces of a pipeline rank's layers.
        ep: number of ranks that share the experts of a layer.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return Layout(gpus=ranks, tp=tp, pp=pp, vp=vp, ep=ep, etp=tp if ep == 1 else 1)


def start_ranks(layout: Layout) -> None:
    """Set up Megatron's groups and torch.distributed, which uses torchrun's variables if they are set.

    Args:
        layout: layout of the model.
    """
    from megatron.core import parallel_state, tensor_parallel

    on_cpu = use_cpu_backend()
    if not on_cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        backend = "gloo" if on_cpu else "nccl"
        if "RANK" in os.environ:
            torch.distributed.init_process_group(backend)
        else:
            torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(**_sizes(layout))
        tensor_parallel.model_parallel_cuda_manual_seed(0)


def _sizes(layout: Layout) -> dict[str, int | None]:
    """Return the layout's sizes under Megatron's names."""
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
    }


def load_chunks(
    checkpoint: Path, dense_folder: Path, spec: UpcycleSpec | None, layout: Layout, dtype: torch.dtype
) -> tuple[list[Any], Architecture]:
    """Return this rank's chunks of a checkpoint's model, ready to compute.

    Args:
        checkpoint: NeMo or Megatron checkpoint, dense or upcycled, saved under any layout.
        dense_folder: the dense parent's Hugging Face folder.
        spec: spec with which the checkpoint was upcycled; None means the spec in the checkpoint's context.
        layout: layout to compute under.
        dtype: type to compute in.

    Returns:
        The chunks, one for each virtual pipeline stage of this rank, and the model's architecture.

    Raises:
        SpecError, CheckpointError: as in `open_checkpoint`; or the layout does not fit the model.
    """
    weights, arch, _ = open_checkpoint(checkpoint, dense_folder, spec)
    with weights.checkpoint:
        weights.require_all_read(arch)
        rules.check_layout(layout, arch, rules.neutral_work(layout))
        start_ranks(layout)
        chunks = build_chunks(arch, layout, dtype)
        load_weights(chunks, weights, arch)
    return chunks, arch


def build_chunks(arch: Architecture, layout: Layout, dtype: torch.dtype) -> list[Any]:
    """Return this rank's chunks with unset weights. Experts drop no token, even if the training dropped tokens.

    Args:
        arch: architecture of the model.
        layout: layout for which Megatron's groups were made.
        dtype: type to compute in.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_upcycle.online.decoder_layers import decoder_layers

    if arch.scaled_embedding:  # Megatron's own model class does not scale the embedding; our layer does
        arch = replace(arch, scaled_embedding=False, embedding_multiplier=arch.hidden_size**0.5)
    on_gpu = torch.cuda.is_available()
    config = TransformerConfig(
        **megatron_fields(arch),
        activation_func=activation_function(arch.activation),
        **window_fields(arch),
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=on_gpu and bool(arch.num_experts),
        moe_router_load_balancing_type=QUANTILES if arch.quantile_bias else "none",  # no balancing loss is needed
        moe_router_dtype="fp32",  # in 16 bits the logits of two copies can be equal
        **_sizes(layout),
        sequence_parallel=layout.tp > 1,  # otherwise a warning of Megatron 0.15 fails
    )
    check_balancing(config, arch.router_score)
    config.sequence_parallel = False  # a single token of a continuation cannot be split
    rows = 8 * layout.tp  # pad the vocabulary as little as possible
    chunks = []
    for stage in range(layout.vp):
        vp_stage = stage if layout.vp > 1 else None
        chunk = GPTModel(
            config,
            decoder_layers(config, on_gpu, vp_stage, **decoder_settings(arch)),
            -(-arch.vocab_size // rows) * rows,
            arch.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_percent=arch.rotary_percent,
            rotary_base=int(arch.rope_theta),
            vp_stage=vp_stage,
        ).to(device="cuda" if on_gpu else "cpu", dtype=dtype)
        turn_as(chunk, arch)
        check_model(chunk, arch)
        chunks.append(chunk.eval())
    return chunks


@torch.no_grad()
def load_weights(chunks: Sequence[Any], weights: CheckpointWeights, arch: Architecture) -> None:
    """Fill this rank's chunks from a checkpoint: each parameter is a parameter of the checkpoint, or a shard.

    Args:
        chunks: chunks from `build_chunks`.
        weights: the open checkpoint.
        arch: architecture of the model.

    Raises:
        CheckpointError: the model has a parameter that the mapping table does not know, or the shapes disagree.
    """
    coords = RankCoords.here()
    parameters = [entry for chunk in chunks for entry in _parameters(chunk, arch, coords)]
    with ProgressLine("load weights", len(parameters), enabled=torch.distributed.get_rank() == 0) as line:
        for parameter, mapping, layer, expert, shard in parameters:
            _fill(parameter, weights.read(mapping, layer, expert), mapping, arch, shard)
            line.advance()


def _parameters(
    chunk: Any, arch: Architecture, coords: RankCoords
) -> Iterator[tuple[torch.Tensor, ParamMapping, int, int, Shard]]:
    """Yield a chunk's parameters with mapping, layer, expert, and this rank's place in the group that shards them.

    The biases that balance experts are buffers, but are read like parameters.
    """
    layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    first_expert = coords.experts.rank * (arch.num_experts or 0) // coords.experts.size
    biases = [(name, buffer) for name, buffer in chunk.named_buffers() if name.endswith(_BALANCING_BIASES)]
    for _, bias in biases:
        bias.data = bias.data.float()  # a 16-bit type rounds the biases
    for name, parameter in (*chunk.named_parameters(), *biases):
        layer, inner = split_name(name, layers)
        match = find_mapping(inner, in_layer=layer is not None)
        if match is None:
            raise CheckpointError(
                f"Parameter {name}",
                kind="state",
                got="is not in the mapping table",
                fix="export the model, and evaluate the exported folder",
            )
        mapping, expert = match
        shard = coords.expert if mapping.is_expert else coords.dense
        stored = stored_as(mapping_of(mapping.role, arch), arch)
        yield parameter, stored, layer or 0, first_expert + (expert or 0), shard


def _fill(parameter: torch.Tensor, whole: torch.Tensor, mapping: ParamMapping, arch: Any, shard: Shard) -> None:
    """Copy a rank's shard of a parameter part by part: gate and up, or query, key and value, are cut separately."""
    if mapping.role in ("embedding", "output"):
        parameter.zero_()  # rows that only pad the vocabulary
    parts = hf_parts(whole, mapping, arch)
    for piece in source_slices(mapping, arch, shard, tuple(parameter.shape)):
        slice_ = parts[piece.part][tuple(slice(*bounds) for bounds in piece.source)]
        piece.view(parameter).copy_(piece.seen(slice_))
