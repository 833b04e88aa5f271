"""A training as the stages and jobs of a run see it, whatever trains: NeMo or Megatron-Bridge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import StageError
from nemo_upcycle.sources.checkpoints import newest_checkpoint
from nemo_upcycle.spec import UpcycleSpec


@dataclass(frozen=True)
class TrainingSettings:
    """The settings of a training, by what may happen to them in a run that has started.

    Attributes:
        fixed: what the result depends on, by the name of its override; may not change.
        steps: how many optimizer steps it takes; may grow. 0 where the recipe alone knows.
        free: what the result does not depend on: logs, checkpoints' interval and retention, nodes, workers.
        step0: of the fixed ones those that the check of step 0 depends on.
    """

    fixed: dict[str, str]
    steps: int
    free: dict[str, str]
    step0: dict[str, str]

    @classmethod
    def sorted_by(
        cls, values: Mapping[str, str], *, steps: str, free: tuple[str, ...], step0: tuple[str, ...]
    ) -> TrainingSettings:
        """Return settings, told apart by their names.

        Args:
            values: every setting, by the name of its override.
            steps: the name of the number of steps.
            free: names, or with a dot at the end their beginnings, of those that are free.
            step0: the same of those that the check of step 0 depends on.
        """

        def are(names: tuple[str, ...]) -> dict[str, str]:
            return {
                name: value
                for name, value in values.items()
                if any(name == one or (one.endswith(".") and name.startswith(one)) for one in names)
            }

        others = are((steps, *free))
        fixed = {name: value for name, value in values.items() if name not in others}
        return cls(fixed, int(float(values.get(steps, 0))), are(free), are(step0))


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
        dispatcher: of tokens to experts: `allgather`, `alltoall`, `deepep`, `hybridep`; `none` in a dense model.
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


class Training(ABC):
    """What a stage asks of a training; one subclass a trainer, made from the text in a run's plan.

    `dense_folder` is the dense parent's, as the import stage found it: recipes of some trainers are complete with it
    alone.
    """

    @property
    @abstractmethod
    def ranks(self) -> tuple[int, int]:
        """Nodes, and ranks on each."""

    @property
    def script(self) -> str | None:
        """The script that was started, if the recipe refers to something defined in it."""
        return None

    @abstractmethod
    def settings(self) -> TrainingSettings:
        """Return its settings, told apart by whether they may change in a run that has started."""

    @abstractmethod
    def profile(self, dense: str) -> Profile | None:
        """Return how it uses its GPUs; None where that is not known before the parent is fetched.

        Args:
            dense: the parent's address.
        """

    @abstractmethod
    def seq_length(self, dense_folder: Path) -> int:
        """Return the tokens of a sequence."""

    @abstractmethod
    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """Return how the model is upcycled."""

    @abstractmethod
    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """Return the configuration of the upcycled model, or of its dense parent, for `check_step0`."""

    @abstractmethod
    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """Train on all ranks of a job; go on where an earlier start stopped.

        Args:
            folder: of the stage, for logs and checkpoints.
            dense_folder: the dense parent.
            data_folder: a finished folder of `nemo-upcycle data`.
            suite: the folder of the suite that scores the live model, where the recipe asks for it.

        Returns:
            On the first rank the last `checkpoint`.

        Raises:
            StageStopped: it was told to stop, and can go on.
            StageError: it left no checkpoint.
        """

    def planned(self, dense: str, card: str) -> dict[str, float] | None:
        """Return memory and speed by the planner, to stand beside what was measured; None where it cannot tell.

        Args:
            dense: the parent's address.
            card: name of the cards that it ran on.
        """
        return None


def open_training(trainer: str, text: str) -> Training:
    """Return the training of a plan's text.

    Args:
        trainer: `nemo` or `bridge`.
        text: the recipe, as the trainer's subclass writes it.
    """
    if trainer == "bridge":
        from nemo_upcycle.pipeline.bridge.training import BridgeTraining

        return BridgeTraining.from_text(text)
    from nemo_upcycle.pipeline.nemo_training import NeMoTraining

    return NeMoTraining(text)


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the highest step that a training left in its stage's folder.

    Raises:
        StageError: there is none.
    """
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise StageError(
            f"checkpoint in {folder}", got="none", expected="a finished checkpoint", fix="run the stage again"
        )
    return checkpoint
