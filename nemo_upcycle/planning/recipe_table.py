"""Describe recipes to the planner and the launchers, by the constants at the top of a file of `recipes/`.

The planner stands below the recipes and never imports them: a command hands it the recipe that it asks about.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.spec import UpcycleSpec


#: What a chain of a tuning trains on and is asked: the demo's conversations, for trying.
CONVERSATIONS, ANSWERS = "chatterbot", "answers"
_Recipe = TypeVar("_Recipe", bound=Callable[..., Any])
#: Rank of LoRA's adapters, by default.
RANK = 8


@dataclass(frozen=True)
class Run:
    """GPUs and layout of a training.

    Args:
        gpus: ranks.
        tp: tensor parallelism of the attention; above 1 with sequence parallelism.
        pp: pipeline stages.
        vp: chunks of each stage; None: one.
        cp: ranks that share a sequence.
        precision: the name in Bridge's recipes; empty: bf16.
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
        seq_length: tokens of a sequence; in a tuning, places of a pack.
        global_batch: sequences of a step, over all ranks.
        steps: steps of the training.
        lr: the highest learning rate.
        min_lr: where its cosine ends.
        warmup_steps: steps until the highest rate.
    """

    seq_length: int
    global_batch: int
    steps: int
    lr: float
    min_lr: float
    warmup_steps: int

    @property
    def tokens(self) -> float:
        """Tokens of the training, to four digits."""
        return float(f"{self.steps * self.seq_length * self.global_batch:.4g}")


@dataclass(frozen=True)
class Tuning:
    """A tuning on conversations.

    Args:
        parent: address of the dense checkpoint, which has a chat template.
        schedule: batches, steps and learning rates.
        gpus: ranks: one, or whole nodes of eight.
        lora: whether the recipe trains LoRA's adapters by default; NeMo alone has it.
    """

    parent: str
    schedule: Schedule
    gpus: int = 1
    lora: bool = False


@dataclass(frozen=True)
class Job:
    """The GPUs that a recipe of Megatron-Bridge's is for.

    Args:
        gpus: ranks; None: the command says it.
        gpu: name in `conf/planning/gpus.yaml`; empty: any with eight to a node.
        tunes: whether it tunes on conversations; None: its configuration says it.
    """

    gpus: int | None = None
    gpu: str = ""
    tunes: bool | None = None


def on_gpus(gpus: int, gpu: str = "", *, tunes: bool = False) -> Callable[[_Recipe], _Recipe]:
    """Say which GPUs a recipe of Megatron-Bridge's is for, see `Job`.

    Example:
        >>> @on_gpus(16, "h100")
        ... def moe(dense="/models/mine", data=None): ...
    """

    def add(recipe: _Recipe) -> _Recipe:
        recipe.job = Job(gpus, gpu, tunes)  # type: ignore[attr-defined]
        return recipe

    return add


def job_of(recipe: Any) -> Job:
    """Return the GPUs that a recipe of Megatron-Bridge's is for; unknown ones if it does not say it."""
    return getattr(recipe, "job", Job())


@dataclass(frozen=True)
class KnownRecipe:
    """A recipe, described to the planner and the launchers.

    Args:
        name: name on the command line.
        title: how a text calls the model.
        dense: architecture that the run starts from.
        spec: spec of the upcycling; None for a dense baseline.
        schedule: batches and steps.
        inputs: `dense`, `data` and `evaluation` of its chain; a dense recipe has no chain, and `dense` alone.
        trainers: `nemo`, `bridge` or both.
        capacity_factor: token slots of an expert, as a multiple of a balanced share; None: no limit.
        h100: whether NeMo's recipe takes the arguments of the paper's recipes, such as `capacity_factor`.
        tunes: whether it tunes on packs of conversations; a micro-batch has one pack.
        lora: whether it trains LoRA's adapters.
        bridge: function of Megatron-Bridge's recipe; empty where Bridge has none.
        bridge_baseline: function of its dense baseline.
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
        """The architecture that is trained."""
        return self.dense.upcycled(self.spec) if self.spec else self.dense

    @property
    def defaults(self) -> dict[str, Any]:
        """The work of a step, by the names of `nemo-upcycle plan`'s options."""
        values: dict[str, Any] = {
            "seq_length": self.schedule.seq_length,
            "global_batch": self.schedule.global_batch,
            "capacity_factor": self.capacity_factor,
            "tokens": self.schedule.tokens,
            "gradients": "fp32",
        }
        return values | ({"lora": RANK} if self.lora else {})

    def makes(self, dense: Architecture, arch: Architecture) -> bool:
        """Tell whether the recipe trains an architecture that starts from a dense one."""
        shape = replace(self.dense, max_positions=dense.max_positions)  # any value makes the same model
        return (shape, shape.upcycled(self.spec) if self.spec else shape) == (dense, arch)
