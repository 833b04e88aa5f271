"""The plan against Megatron itself: real modules of every kind of rank, on meta, under a fake process group.

Nothing is computed or allocated, so one core can check a cluster of thousands of ranks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.models.architecture import BALANCING_BIASES, Architecture
from nemo_upcycle.models.layer_settings import decoder_settings
from nemo_upcycle.models.megatron_config import megatron_fields
from nemo_upcycle.models.sharding import Shard
from nemo_upcycle.online.plan import ParamPlan, RankCoords, param_plans
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.parameters import OPTIMIZER_BYTES, StagePlan
from nemo_upcycle.planning.workload import Workload
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.attributes import temporarily_set
from nemo_upcycle.utils.progress import track


#: Ways of building a rank besides Megatron's local spec: real Transformer Engine modules, without and with FP8.
TRANSFORMER_ENGINE = ("bf16", "delayed", "tensorwise", "blockwise")


@dataclass(frozen=True)
class CheckResult:
    """What was compared.

    Args:
        ranks: of the cluster.
        kinds: different ranks built; ranks of one kind have equal pp, tp, ep and etp ranks.
        parameters: elements of all built ranks together, equal to the plan's.
        tensors: parameters of all built ranks that the read plan fills once.
        specs: `local`, and the Transformer Engine builds of a rank of every stage.
    """

    ranks: int
    kinds: int
    parameters: int
    tensors: int
    specs: tuple[str, ...]


def check_layout_against_megatron(
    arch: Architecture,
    layout: Layout,
    work: Workload,
    dense: Architecture | None = None,
    spec: UpcycleSpec | None = None,
) -> CheckResult:
    """Build every kind of rank of a layout, and compare it with the plan and with the read plan.

    Compared are its parameters, and the bytes of its buffers of weights, gradients and optimizer states.

    With Transformer Engine and CUDA, a rank of every stage is also built of its modules, in BF16 and with each FP8
    recipe.

    Args:
        arch: of the model that is trained.
        layout: the cluster's.
        work: its precision and gradients decide the buffers.
        dense: the architecture it is upcycled from; without one only the parameters are compared.
        spec: how.

    Raises:
        UpcycleError: a rank differs; the text names the first.
    """
    kinds: dict[tuple[int, int, int, int], int] = {}
    for rank in range(layout.gpus):
        ranks = layout.group_ranks(rank)
        kinds.setdefault((ranks.pp, ranks.tp, ranks.ep, ranks.etp), rank)
    has_engine = importlib.util.find_spec("transformer_engine") is not None and torch.cuda.is_available()
    engines = TRANSFORMER_ENGINE if has_engine else ()
    stages = [stage * (layout.gpus // layout.pp) for stage in range(layout.pp)]
    jobs: list[tuple[int, str | None]] = [(rank, None) for rank in kinds.values()]
    jobs += [(rank, engine) for engine in engines for rank in stages]
    plans: dict[int, StagePlan] = {}
    elements = tensors = 0
    for rank, engine in track(jobs, "check", total=len(jobs)):
        ranks = layout.group_ranks(rank)
        coords = RankCoords(Shard(ranks.tp, layout.tp), Shard(ranks.etp, layout.etp), Shard(ranks.ep, layout.ep))
        if ranks.pp not in plans:
            plans[ranks.pp] = StagePlan(arch, layout, work, ranks.pp)
        with megatron_rank(layout, rank) as built_ranks:
            _compare(rank, "tp, ep, etp, pp rank", built_ranks, (ranks.tp, ranks.ep, ranks.etp, ranks.pp))
            chunks = build_rank(arch, layout, engine)
            for number, chunk in enumerate(chunks):
                planned = sum(param.numel for param in plans[ranks.pp].chunks[number])
                built = sum(parameter.numel() for parameter in chunk.parameters())
                _compare(rank, f"parameters of chunk {number} ({engine or 'local'})", built, planned)
                elements += built
                if dense is not None:
                    read_plan = param_plans(chunk, dense, arch, spec, coords)
                    tensors += _compare_rows(rank, read_plan, chunk, arch)
            if engine is None:
                states = replace(work, low_params=False)  # the local modules have none
                plan = StagePlan(arch, layout, states, ranks.pp)
                dense_shard = ranks.dp * layout.cp + ranks.cp
                owned = plan.optimizer_bytes(dense_shard, ranks.expert_dp)
                planned_bytes = plan.weights_bytes, plan.gradients_bytes, owned
                what = "bytes of weights, gradients, optimizer"
                _compare(rank, what, allocated_bytes(chunks, work.gradients), planned_bytes)
    return CheckResult(layout.gpus, len(kinds), elements, tensors, ("local", *engines))


def allocated_bytes(chunks: list[Any], gradients: str) -> tuple[int, int, int]:
    """Return the bytes of weights, gradients and optimizer states that Megatron-Core's wrapper gives a rank.

    Args:
        chunks: of the rank, from `build_rank`; they become BF16.
        gradients: what they are summed in, one of `workload.GRADIENTS`.
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


def _compare_rows(rank: int, plans: list[ParamPlan], chunk: Any, arch: Architecture) -> int:
    """Check that a read plan fills each row of each of a chunk's parameters once; return their number."""
    parameters = [plan for plan in plans if plan.made_of.mapping.role not in BALANCING_BIASES]  # which are buffers
    names = sorted(name for plan in parameters for name in plan.names)
    _compare(rank, "parameters in the read plan", names, sorted(name for name, _ in chunk.named_parameters()))
    for plan in plans:
        if not plan.made_of.is_drawn:
            _compare(rank, f"rows filled of {plan.names[0]}", *_rows(plan, arch))
    return len(names)


def _compare(rank: int, what: str, built: object, planned: object) -> None:
    if built != planned:
        raise UpcycleError(
            f"rank {rank}: {what}",
            got=f"{built} (Megatron)",
            expected=f"{planned} (plan)",
            fix="report it: the plan and Megatron-Core disagree",
        )


@contextmanager
def megatron_rank(layout: Layout, rank: int) -> Iterator[tuple[int, int, int, int]]:
    """Stand for one rank of a simulated cluster: Megatron's own groups, over a fake back end.

    Yields:
        Its ranks in the tp, ep, etp and pp groups, as Megatron counts.
    """
    from megatron.core import parallel_state as ps
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.gpus)
    try:
        ps.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
            context_parallel_size=layout.cp,
            expert_model_parallel_size=layout.ep,
            expert_tensor_parallel_size=layout.etp,
            create_gloo_process_groups=False,
        )
        yield (
            ps.get_tensor_model_parallel_rank(),
            ps.get_expert_model_parallel_rank(),
            ps.get_expert_tensor_parallel_rank(),
            ps.get_pipeline_model_parallel_rank(),
        )
    finally:
        ps.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def build_rank(arch: Architecture, layout: Layout, engine: str | None = None) -> list[Any]:
    """Return the chunks of the rank that this process stands for, each a `GPTModel` of Megatron on the meta device.

    Args:
        arch: the model's shapes.
        layout: the cluster's.
        engine: one of `TRANSFORMER_ENGINE`; None for Megatron's own modules.
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
    # Megatron's routers make their biases on the current device, which only Transformer Engine's modules need.
    current_device = (lambda: torch.device("meta")) if engine is None else torch.cuda.current_device
    chunks = []
    for number, parts in enumerate(layout.chunks(arch, ps.get_pipeline_model_parallel_rank())):
        stage = number if layout.vp > 1 else None
        block = decoder_layers(config, engine is not None, stage, **decoder_settings(arch))
        # Tied embeddings stay where they are made: Megatron moves them to the GPU to make them equal on both stages.
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
    """Return Megatron's configuration of a model under a layout, for building it without initialising it."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    # The token dispatcher that asks for no CUDA stream.
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
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        num_layers_in_first_pipeline_stage=layout.first,
        num_layers_in_last_pipeline_stage=layout.last,
        account_for_embedding_in_pipeline_split=bool(layout.embedding),
        account_for_loss_in_pipeline_split=bool(layout.loss),
        sequence_parallel=layout.tp > 1,
    )
    # They change no shape, and the local spec's norm and attention refuse them.
    config.sequence_parallel, config.context_parallel_size, config.layernorm_zero_centered_gamma = False, 1, False
    return config


def _rows(plan: ParamPlan, moe_arch: Architecture) -> tuple[list[int], list[int]]:
    """Return the rows that the slices of a plan fill, in order, and those that have to be filled."""
    rows = plan.tensors[0].shape[0]
    filled = sorted(
        block * (rows // piece.blocks) + row
        for _, piece in plan.made_of.slices
        for block in range(piece.blocks)
        for row in range(*piece.rows)
    )
    real = rows
    if plan.made_of.mapping.role in ("embedding", "output"):
        real = max(0, min(rows, moe_arch.vocab_size - plan.made_of.shard.rank * rows))
    return filled, list(range(real))
