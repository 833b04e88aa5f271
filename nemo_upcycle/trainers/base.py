"""A training as everything outside the trainers sees it: the contract that NeMo and Megatron-Bridge fill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nemo_upcycle.errors import StageError, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.planning.layout import CPU_RANKS, Layout
from nemo_upcycle.planning.memory import checkpoint_bytes
from nemo_upcycle.planning.workload import MODULES
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.paper import high_rate
from nemo_upcycle.trainers.settings import STEPS, by_class, free_settings, step0_settings


#: Set by NVIDIA's `ft_launcher` for the ranks that it watches: the socket of the process that does.
FT_SOCKET = "FT_RANK_MONITOR_IPC_SOCKET"


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training, sorted by how they may change in a run that has started.

    Attributes:
        fixed: override -> value of settings that the result depends on; may not change.
        steps: number of optimizer steps; may grow. 0 if only the recipe knows it.
        free: settings without effect on the result: logs, checkpoints' interval and retention, nodes, workers.
        step0: fixed settings that the check of step 0 depends on.
    """

    fixed: dict[str, str]
    steps: int
    free: dict[str, str]
    step0: dict[str, str]

    @classmethod
    def sorted_by(
        cls, values: Mapping[str, str], *, steps: str, free: tuple[str, ...], step0: tuple[str, ...]
    ) -> TrainingSettings:
        """Sort settings by their names.

        Args:
            values: override -> value of every setting.
            steps: name of the number of steps.
            free: names of free settings; one that ends with a dot stands for all that begin so.
            step0: names of settings that the check of step 0 depends on, in the form of `free`.
        """

        paths = by_class(values).items()

        def named(names: tuple[str, ...]) -> dict[str, str]:
            begun = tuple(one for one in names if one.endswith("."))
            return {name: values[name] for name, path in paths if path in names or path.startswith(begun)}

        others = named((steps, *free))
        fixed = {name: value for name, value in values.items() if name not in others}
        return cls(fixed, int(float(values.get(steps, 0))), named(free), named(step0))


@dataclass(frozen=True)
class Profile:
    """How a training uses its GPUs, in the words of `conf/performance.yaml`.

    Args:
        accelerator: what the recipe asks for: `gpu`, `cpu`, or `auto` for what is there.
        tp: tensor parallelism.
        cp: context parallelism.
        pp: pipeline stages.
        ep: expert parallelism.
        precision: the planner's name of it: `bf16`, `fp8-current`.
        dispatcher: what sends tokens to experts: `allgather`, `alltoall`, `deepep`, `hybridep`, `ncclep`; `none` in a
            dense model.
        overlaps_experts: whether other work hides the experts' communication (`overlap_moe_expert_parallel_comm`).
        cuda_graphs: whether parts of a step are captured.
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
        """Return the profile of Megatron's settings, built or as configurations of NeMo-Run.

        Args:
            sizes: has `tensor_model_parallel_size` and its siblings.
            model: a `TransformerConfig`.
            ddp: a `DistributedDataParallelConfig`, or anything without its fields.
            accelerator: what the recipe asks for.
            precision: the planner's name of it.
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
    """What a training scores on its way.

    Args:
        suite: its name, or the folder of a finished one.
        every_n_steps: steps from one evaluation to the next.
        limit: items of a task, at most; None: all.
        batch_size: texts of a pass; None: as the suite says.
    """

    suite: str
    every_n_steps: int = 500
    limit: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What jobs, a forecast and a grid ask of a training.

    Args:
        recipe: its name.
        arch: architecture of its model.
        knows_vocabulary: whether `arch` counts the embeddings.
        layout: parallel sizes.
        profile: how it uses its GPUs.
        seq_length: tokens of a sequence.
        global_batch: sequences of a step.
        steps: optimizer steps of the whole training.
        capacity_factor: token slots of an expert over its even share; None drops nothing.
        pad: whether experts are padded up to their capacity.
        grouped: whether the experts multiply as one grouped product.
        recompute: the planner's kind, as the training begins.
        first_steps: after how many steps it ceases to recompute MoE layers; 0: it goes on as it begins.
        overlap: what runs beside computation, in the planner's words.
        gradients: what data parallelism sums them in, in the planner's words.
        optimizer: the planner's name of it.
        low_params: whether parameters are kept and gathered in FP8 or FP4.
        rank_capacity: token slots that a rank's experts have room for, over those of perfect balance; None: any.
        lora: rank of the adapters that are trained beside the routers; 0: all weights are trained.
        software: the generation of Megatron-Core that trains, in the planner's words.
        weight_bytes: bytes of a parameter in a checkpoint.
        save_every: steps between two checkpoints.
        save_setting: the override that sets it.
        keeps: checkpoints that stay at its end; None: all.
        evaluations: what it scores on its way; None: nothing.
        uses_wandb: whether it sends its metrics to Weights & Biases.
        schedule: what tells schedules of the learning rate apart.
        is_rate_constant: whether the learning rate stays what it is.
        rate: the learning rate's peak; None: not known.
        warmup_steps: steps until then.
        positions: tokens of a sequence that the parent was trained on, at most; None: not known.
    """

    recipe: str
    arch: Architecture
    knows_vocabulary: bool
    layout: Layout
    profile: Profile
    seq_length: int
    global_batch: int
    steps: int
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
    weight_bytes: int
    save_every: int
    save_setting: str
    keeps: int | None
    evaluations: Evaluations | None = None
    uses_wandb: bool = False
    schedule: str
    is_rate_constant: bool
    rate: float | None
    warmup_steps: int
    positions: int | None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What few mean to do."""
        found = []
        if self.rate and self.warmup_steps >= self.steps:
            reached = f"{self.warmup_steps} steps of warm-up, {self.steps} of training"
            found.append(f"the learning rate never reaches its peak, {self.rate:g}: {reached}")
        if self.positions and self.seq_length > self.positions:
            limit = f"more than the {self.positions} positions that the parent was trained on"
            found.append(f"sequences of {self.seq_length} tokens, {limit}")
        return tuple(filter(None, [high_rate(self.rate), *found]))

    @property
    def step_tokens(self) -> int:
        """Tokens of a step."""
        return self.seq_length * self.global_batch

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint with optimizer states."""
        return checkpoint_bytes(self.arch, self.lora, self.weight_bytes)

    @staticmethod
    def of_model(config: Any, arch: Architecture, layout: Layout, profile: Profile) -> dict[str, Any]:
        """Return the facts that follow from Megatron's configuration of a model, of either trainer.

        Args:
            config: a `TransformerConfig`, or NeMo-Run's configuration of one.
            arch: architecture of the model.
            layout: parallel sizes.
            profile: how it uses its GPUs.
        """
        granularity, named = config.recompute_granularity, config.recompute_modules
        modules = ["core_attn"] if named is None else named  # Megatron's own
        recomputed = ",".join(name for name in MODULES if granularity == "selective" and name in modules) or "none"
        return {
            "arch": arch,
            "layout": layout,
            "profile": profile,
            "capacity_factor": config.moe_expert_capacity_factor if arch.num_experts else None,
            "pad": bool(arch.num_experts and config.moe_pad_expert_input_to_capacity),
            "grouped": bool(getattr(config, "moe_grouped_gemm", False)),
            "recompute": "full" if granularity == "full" else recomputed,
            "rank_capacity": getattr(config, "moe_expert_rank_capacity_factor", None),
        }


class Training(ABC):
    """What everything outside the trainers asks of a training; one subclass a trainer, made from a plan's text.

    `dense_folder` is the dense parent's, as the import stage found it: recipes of some trainers are complete with it
    alone.
    """

    #: The trainer, as `trainers/settings.py` and `trainers/commands.py` name it.
    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def from_text(cls, text: str) -> Training:
        """Return the training of a plan's text."""

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, int]:
        """Nodes, and ranks on each."""

    @property
    def is_for_gpus(self) -> bool:
        """Whether it asks for GPUs: a trial on a CPU has at most `CPU_RANKS` ranks."""
        nodes, per_node = self.ranks
        return nodes * per_node > CPU_RANKS

    @property
    def reads_chat(self) -> bool:
        """Whether it tunes on conversations, and does not train on texts."""
        return False

    @property
    def script(self) -> str | None:
        """The script that was started, if the recipe refers to something defined in it."""
        return None

    @abstractmethod
    def named_settings(self) -> dict[str, str]:
        """Return every setting that is known without the parent, by the name of its override."""

    def settings(self) -> TrainingSettings:
        """Return its settings, told apart by whether they may change in a run that has started."""
        steps, free, step0 = STEPS.of(self.name), free_settings(self.name), step0_settings(self.name)
        return TrainingSettings.sorted_by(self.named_settings(), steps=steps, free=free, step0=step0)

    @abstractmethod
    def facts(self, parent: Parent) -> TrainingFacts | None:
        """Say what it is and takes; None where that is not known before the parent is fetched.

        Args:
            parent: the dense parent.
        """

    @abstractmethod
    def shown_settings(self, parent: Parent) -> dict[str, Any]:
        """Return the values of the settings that people look at, by the names of their overrides."""

    @abstractmethod
    def check(self, stage: str) -> None:
        """Check what can be told without the parent and without what the machine has.

        Args:
            stage: `pretrain`, or `dense_ct`, which upcycles nothing.

        Raises:
            UpcycleError: a setting is not valid; the text names it.
        """

    @abstractmethod
    def check_parent(self, stage: str, parent: Parent, *, remote: bool) -> None:
        """Check that the training can start from a parent.

        Args:
            stage: name of the stage, see `check`.
            parent: the dense parent.
            remote: whether to fetch a parent that is not here, and to fail if that is impossible.

        Raises:
            UpcycleError: the training cannot start from it.
        """

    @abstractmethod
    def check_here(self, stage: str) -> None:
        """Check that this machine has what the training asks for, else raise an UpcycleError."""

    def problems(self, stage: str, parent: Parent) -> tuple[UpcycleError, ...]:
        """List all that would keep the job from its first step, as far as it can be told before anything is built.

        Args:
            stage: what stands before its settings in errors: `pretrain`, `dense_ct`, see `check`, or an arm of a grid.
            parent: the dense parent.
        """
        return ()

    @abstractmethod
    def seq_length(self, dense_folder: Path) -> int:
        """Return the tokens of a sequence."""

    @abstractmethod
    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """Give the spec by which the model is upcycled."""

    @abstractmethod
    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """Return the configuration of the upcycled model, or of its dense parent, for `check_step0`."""

    @abstractmethod
    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """Train on all ranks of a job; go on where an earlier start stopped.

        Args:
            folder: folder of the stage, for logs and checkpoints.
            dense_folder: the dense parent.
            data_folder: a finished folder of `nemo-upcycle data`.
            suite: the folder of the suite that scores the live model, where the recipe asks for it.

        Returns:
            On the first rank the last `checkpoint`.

        Raises:
            StageStopped: a signal stopped it; it can go on.
            StageError: it left no checkpoint.
        """


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the highest step that a training left in its stage's folder.

    Raises:
        StageError: there is none.
    """
    if checkpoint := newest_checkpoint(folder / "checkpoints"):
        return checkpoint
    raise StageError(f"checkpoint in {folder}", got="none", expected="a finished one", fix="run the stage again")
