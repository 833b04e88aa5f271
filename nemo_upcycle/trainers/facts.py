"""The facts of a training in either trainer: model, layout, computation, checkpoints and learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.layout import Layout
from nemo_upcycle.planning.memory import checkpoint_bytes
from nemo_upcycle.planning.workload import MODULES
from nemo_upcycle.trainers.paper import high_rate


@dataclass(frozen=True)
class Profile:
    """How a training uses its GPUs, in the terms of `conf/performance.yaml`.

    Args:
        accelerator: device that the recipe asks for: `gpu`, `cpu`, or `auto` for whatever is present.
        tp: tensor parallelism.
        cp: context parallelism.
        pp: pipeline stages.
        ep: expert parallelism.
        precision: the planner's name of the precision: `bf16`, `fp8-current`.
        dispatcher: operation or library that sends tokens to experts: `allgather`, `alltoall`, `deepep`, `hybridep`,
            `ncclep`; `none` in a dense model.
        overlaps_experts: whether other work hides the experts' communication (`overlap_moe_expert_parallel_comm`).
        cuda_graphs: whether CUDA graphs capture parts of a step.
        user_buffers: whether NCCL gets registered buffers (`nccl_ub`).
    """

    accelerator: str = "auto"
    tp: int = 1
    cp: int = 1
    pp: int = 1
    ep: int = 1
    precision: str = "bf16"
    dispatcher: str = "none"
    overlaps_experts: bool = False
    cuda_graphs: bool = False
    user_buffers: bool = False

    @classmethod
    def of(cls, sizes: Any, model: Any, ddp: Any, *, accelerator: str, precision: str) -> Profile:
        """Return the profile of Megatron's settings, given as objects or as NeMo-Run configurations.

        Args:
            sizes: object with `tensor_model_parallel_size` and its siblings.
            model: a `TransformerConfig`.
            ddp: a `DistributedDataParallelConfig`, or an object that lacks its fields.
            accelerator: device that the recipe asks for.
            precision: the planner's name of the precision.
        """

        def size(name: str) -> int:
            return getattr(sizes, f"{name}_model_parallel_size", None) or 1

        def has(name: str, *off: Any) -> bool:
            return getattr(model, name, None) not in (None, False, *off)

        dispatcher = getattr(model, "moe_token_dispatcher_type", "allgather")
        if dispatcher == "flex":
            dispatcher = getattr(model, "moe_flex_dispatcher_backend", None) or "deepep"
        return cls(
            accelerator=accelerator,
            tp=size("tensor"),
            cp=getattr(sizes, "context_parallel_size", None) or 1,
            pp=size("pipeline"),
            ep=size("expert"),
            precision=precision,
            dispatcher=dispatcher if has("num_moe_experts") else "none",
            overlaps_experts=has("overlap_moe_expert_parallel_comm"),
            cuda_graphs=has("enable_cuda_graph") or has("external_cuda_graph") or has("cuda_graph_impl", "none"),
            user_buffers=bool(getattr(ddp, "nccl_ub", False)),
        )


@dataclass(frozen=True, kw_only=True)
class Evaluations:
    """The evaluations of the live model during training.

    Args:
        suite: name of a suite, or the folder of a finished suite.
        every_n_steps: steps from one evaluation to the next.
        limit: maximum number of items per task; None: all.
        batch_size: texts per pass; None: the suite's value.
    """

    suite: str
    every_n_steps: int = 500
    limit: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Computation:
    """How a training computes a step, in the planner's terms.

    Args:
        capacity_factor: token slots of an expert, as a multiple of its even share; None: no token is dropped.
        pad: whether experts are padded up to their capacity.
        grouped: whether the experts multiply as one grouped product.
        recompute: kind of recomputation at the start of the training.
        first_steps: number of steps after which MoE layers are no longer recomputed; 0: recomputation never stops.
        overlap: communication that runs at the same time as computation.
        gradients: type in which data parallelism sums gradients.
        optimizer: name of the optimizer.
        low_params: whether parameters are kept and gathered in FP8 or FP4.
        rank_capacity: receive buffer of a rank's experts, as a multiple of the tokens at perfect balance; None: no
            limit.
        lora: rank of the adapters that are trained beside the routers; 0: all weights are trained.
        software: generation of Megatron-Core that runs the training.
    """

    capacity_factor: float | None
    pad: bool
    grouped: bool
    recompute: str
    first_steps: int = 0
    overlap: tuple[str, ...] = ()
    gradients: str
    optimizer: str = "adam"
    low_params: bool = False
    rank_capacity: float | None = None
    lora: int = 0
    software: str

    @staticmethod
    def of_model(config: Any, *, has_experts: bool) -> dict[str, Any]:
        """Return the fields that follow from a model's Megatron configuration, in either trainer.

        Args:
            config: a `TransformerConfig`, or NeMo-Run's configuration of one.
            has_experts: whether the model has experts.
        """
        granularity, named = config.recompute_granularity, config.recompute_modules
        modules = ["core_attn"] if named is None else named  # Megatron's default
        recomputed = ",".join(name for name in MODULES if granularity == "selective" and name in modules) or "none"
        return {
            "capacity_factor": config.moe_expert_capacity_factor if has_experts else None,
            "pad": bool(has_experts and config.moe_pad_expert_input_to_capacity),
            "grouped": bool(getattr(config, "moe_grouped_gemm", False)),
            "recompute": "full" if granularity == "full" else recomputed,
            "rank_capacity": getattr(config, "moe_expert_rank_capacity_factor", None),
        }


@dataclass(frozen=True, kw_only=True)
class Saving:
    """The size, interval and retention of a training's checkpoints.

    Args:
        weight_bytes: bytes per parameter in a checkpoint.
        every_n_steps: steps between two checkpoints.
        setting: override that sets this interval.
        keeps: number of checkpoints that remain at the end of the training; None: all.
        is_async: whether training goes on during a save.
    """

    weight_bytes: int
    every_n_steps: int
    setting: str
    keeps: int | None
    is_async: bool


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate of a training.

    Args:
        schedule: text that identifies the schedule.
        is_constant: whether the rate never changes.
        peak: highest rate; None: unknown.
        warmup_steps: steps until the peak.
    """

    schedule: str
    is_constant: bool
    peak: float | None
    warmup_steps: int


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """The facts of a training that jobs, a forecast and a grid need.

    Args:
        recipe: name of the recipe.
        arch: architecture of the model.
        knows_vocabulary: whether the vocabulary size is known, so that `arch` counts the embeddings.
        layout: parallel sizes.
        profile: use of the GPUs.
        seq_length: length of a sequence (tokens).
        global_batch: sequences per step.
        steps: optimizer steps of the whole training.
        computation: how a step is computed.
        saving: size, interval and retention of checkpoints.
        rate: learning rate.
        evaluations: evaluations during training; None: no evaluations.
        uses_wandb: whether the training sends its metrics to Weights & Biases.
        positions: longest sequence that the parent was trained on (tokens); None: unknown.
    """

    recipe: str
    arch: Architecture
    knows_vocabulary: bool
    layout: Layout
    profile: Profile
    seq_length: int
    global_batch: int
    steps: int
    computation: Computation
    saving: Saving
    rate: LearningRate
    evaluations: Evaluations | None = None
    uses_wandb: bool = False
    positions: int | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """Settings that are probably mistakes."""
        found, rate = [], self.rate
        if rate.peak and rate.warmup_steps >= self.steps:
            reached = f"{rate.warmup_steps} steps of warm-up, {self.steps} of training"
            found.append(f"the learning rate never reaches its peak, {rate.peak:g}: {reached}")
        if self.positions and self.seq_length > self.positions:
            limit = f"more than the {self.positions} positions that the parent was trained on"
            found.append(f"sequences of {self.seq_length} tokens, {limit}")
        return tuple(filter(None, [high_rate(rate.peak), *found]))

    @property
    def step_tokens(self) -> int:
        """Tokens per step."""
        return self.seq_length * self.global_batch

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint with optimizer states."""
        return checkpoint_bytes(self.arch, self.computation.lora, self.saving.weight_bytes)
