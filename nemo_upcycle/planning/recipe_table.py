"""Descriptions of recipes for the planner and the launchers, made from the constants at the top of each recipe file.

The planner is a lower layer than `recipes/` and never imports a recipe. A command passes the recipe to the planner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.spec import UpcycleSpec


#: Default conversations and evaluation suite of a fine-tuning chain. Both come from the demo and are meant for a first
#: try.
CONVERSATIONS, ANSWERS = "chatterbot", "answers"
_Recipe = TypeVar("_Recipe", bound=Callable[..., Any])
#: Default rank of LoRA adapters.
RANK = 8


@dataclass(frozen=True)
class Run:
    """GPUs and layout of a training.

    Args:
        gpus: number of ranks.
        tp: tensor parallelism of the attention; if it is above 1, sequence parallelism is on.
        pp: pipeline stages.
        vp: chunks of each stage; None for one chunk.
        cp: number of ranks that share a sequence.
        precision: name of the precision in Bridge's recipes; empty for bf16.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    vp: int | None = None
    cp: int = 1
    precision: str = ""

    @property
    def nodes(self) -> int:
        """Number of machines with eight GPUs each."""
        return max(1, self.gpus // 8)

    def __str__(self) -> str:
        sizes = {"TP": self.tp, "CP": self.cp, "PP": self.pp, "VPP": self.vp or 1}
        return " ".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "data parallelism alone"


@dataclass(frozen=True)
class Schedule:
    """Batches, steps and learning rates of a training.

    Args:
        seq_length: tokens of a sequence; in fine-tuning, tokens of a pack.
        global_batch: sequences of a step, over all ranks.
        steps: steps of the training.
        lr: peak learning rate.
        min_lr: learning rate at the end of the cosine.
        warmup_steps: steps until the peak learning rate.
    """

    seq_length: int
    global_batch: int
    steps: int
    lr: float
    min_lr: float
    warmup_steps: int

    @property
    def tokens(self) -> float:
        """Number of tokens of the training, rounded to four digits."""
        return float(f"{self.steps * self.seq_length * self.global_batch:.4g}")


@dataclass(frozen=True)
class Tuning:
    """A fine-tuning on conversations.

    Args:
        parent: address of the dense checkpoint, which must have a chat template.
        schedule: batches, steps and learning rates.
        gpus: number of ranks, which is one or a multiple of eight.
        lora: whether the recipe trains LoRA adapters by default; only NeMo's recipes can.
    """

    parent: str
    schedule: Schedule
    gpus: int = 1
    lora: bool = False


@dataclass(frozen=True)
class Job:
    """The GPUs that a Megatron-Bridge recipe is made for.

    Args:
        gpus: number of ranks; None if the command sets the number.
        gpu: name in `conf/planning/gpus.yaml`; empty for any GPU in nodes of eight.
        tunes: whether the recipe fine-tunes on conversations; None if only the recipe's configuration shows this.
    """

    gpus: int | None = None
    gpu: str = ""
    tunes: bool | None = None


def on_gpus(gpus: int, gpu: str = "", *, tunes: bool = False) -> Callable[[_Recipe], _Recipe]:
    """Mark a Megatron-Bridge recipe with the GPUs that it is made for, see `Job`.

    Example:
        >>> @on_gpus(16, "h100")
        ... def moe(dense="/models/mine", data=None): ...
    """

    def add(recipe: _Recipe) -> _Recipe:
        recipe.job = Job(gpus, gpu, tunes)  # type: ignore[attr-defined]
        return recipe

    return add


def job_of(recipe: Any) -> Job:
    """Return the GPUs that a Megatron-Bridge recipe is made for; an empty `Job` if the recipe is not marked."""
    return getattr(recipe, "job", Job())


@dataclass(frozen=True)
class KnownRecipe:
    """The description of a recipe for the planner and the launchers.

    Args:
        name: name on the command line.
        title: name of the model in texts.
        dense: architecture that the run starts from.
        spec: spec of the upcycling; None for a dense baseline.
        schedule: batches and steps.
        inputs: `dense`, `data` and `evaluation` of the recipe's chain; a dense recipe has no chain and only `dense`.
        trainers: `nemo`, `bridge` or both.
        capacity_factor: token slots of an expert, as a multiple of a balanced share; None for no limit.
        h100: whether NeMo's recipe takes the arguments of the paper's recipes, such as `capacity_factor`.
        tunes: whether the recipe fine-tunes on packed conversations; a micro-batch has one pack.
        lora: whether the recipe trains LoRA adapters.
        bridge: function of Megatron-Bridge's recipe; empty if Bridge has no recipe.
        bridge_baseline: function of Megatron-Bridge's dense baseline.
    """

    name: str
    title: str
    dense: Architecture
    spec: UpcycleSpec | None
    schedule: Schedule
    inputs: dict[str, str] = field(default_factory=dict)
    trainers: tuple[str, ...] = ()
    capacity_factor: float | None = None
    h100: bool = True
    tunes: bool = False
    lora: bool = False
    bridge: str = ""
    bridge_baseline: str = ""

    @property
    def arch(self) -> Architecture:
        """The trained architecture: upcycled if there is a spec, else dense."""
        return self.dense.upcycled(self.spec) if self.spec else self.dense

    @property
    def defaults(self) -> dict[str, Any]:
        """The recipe's values for the options of `nemo-upcycle plan`, by the names of the options."""
        values: dict[str, Any] = {
            "seq_length": self.schedule.seq_length,
            "global_batch": self.schedule.global_batch,
            "capacity_factor": self.capacity_factor,
            "tokens": self.schedule.tokens,
            "gradients": "fp32",
        }
        return values | ({"lora": RANK} if self.lora else {})

    def makes(self, dense: Architecture, arch: Architecture) -> bool:
        """Return whether the recipe starts from the architecture `dense` and trains the architecture `arch`."""
        shape = replace(self.dense, max_positions=dense.max_positions)  # max_positions does not change the model
        return (shape, shape.upcycled(self.spec) if self.spec else shape) == (dense, arch)
