"""A training in NeMo: a NeMo-Run recipe behind the `Training` interface, run in the folder of a stage."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import fiddle as fdl

from nemo_upcycle.errors import SpecError, StageStopped, UpcycleError
from nemo_upcycle.models.architecture import Architecture
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.planning.hardware import DEFAULT_SOFTWARE, parents
from nemo_upcycle.planning.parameters import WEIGHT_BYTES
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.base import Training, last_checkpoint
from nemo_upcycle.trainers.facts import Computation, Evaluations, LearningRate, Profile, Saving, TrainingFacts
from nemo_upcycle.trainers.kept_checkpoints import count_kept
from nemo_upcycle.trainers.layout import layout_of
from nemo_upcycle.trainers.lineage import skipped_samples
from nemo_upcycle.trainers.nemo.checks import (
    check_parent,
    check_recipe,
    is_for_gpus,
    parent_within_reach,
    precision_name,
    ranks_of,
    reads_chat,
)
from nemo_upcycle.trainers.nemo.recipes import (
    every_setting,
    load_recipe,
    model_config,
    place_recipe,
    recipe_spec,
    train_on,
)
from nemo_upcycle.trainers.run_calibration import with_calibration
from nemo_upcycle.trainers.settings import FP8_RECIPE, LR, SAVE_EVERY, WARMUP, all_wrong, setting, shown_settings
from nemo_upcycle.utils.console import is_verbose
from nemo_upcycle.utils.ranks import is_first_rank


#: Sizes by which a model is compared with the known parents if the model's vocabulary size is missing.
_SHAPE = ("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "tied_embeddings")


@dataclass(frozen=True)
class NeMoTraining(Training):
    """A training in NeMo; see `Training`.

    Args:
        text: the serialised recipe.
    """

    name = "nemo"

    text: str

    @classmethod
    def from_text(cls, text: str) -> NeMoTraining:
        """See `Training.from_text`."""
        return cls(text)

    @cached_property
    def recipe(self) -> Any:
        """The recipe; callers share the object and must not change it."""
        return load_recipe(self.text)

    @property
    def ranks(self) -> tuple[int, int]:
        """See `Training.ranks`."""
        return ranks_of(self.recipe)

    @property
    def is_for_gpus(self) -> bool:
        """See `Training.is_for_gpus`."""
        return is_for_gpus(self.recipe)

    @property
    def reads_chat(self) -> bool:
        """See `Training.reads_chat`."""
        return reads_chat(self.recipe)

    @property
    def script(self) -> str | None:
        """See `Training.script`."""
        if any(value.startswith("__main__.") for _, value in every_setting(self.recipe)):
            return str(Path(sys.modules["__main__"].__file__ or "").absolute())
        return None

    def named_settings(self) -> dict[str, str]:
        """See `Training.named_settings`."""
        return dict(every_setting(self.recipe))

    def facts(self, parent: Parent) -> TrainingFacts:
        """See `Training.facts`; a recipe states every fact except the vocabulary of an unknown parent."""
        arch, knows_vocabulary = _model_of(self.recipe, parent)
        recipe = copy.deepcopy(self.recipe)
        train_on(recipe, "", parent.address)  # the stage makes the same change
        trainer, config, data, nodes_and_ranks = recipe.trainer, recipe.model.config, recipe.data, self.ranks
        callbacks = getattr(trainer, "callbacks", None) or []
        first_steps = next((item.steps for item in callbacks if _is(item, "RecomputeFirstSteps")), 0)
        overlaps = next((item for item in callbacks if hasattr(item, "tp_comm_overlap")), None)
        precision = str(setting(recipe, "trainer.plugins.precision") or "bf16")
        steps = trainer.max_steps
        layout = layout_of(trainer.strategy, nodes_and_ranks[0] * nodes_and_ranks[1], data.micro_batch_size)
        ddp = getattr(trainer.strategy, "ddp", None)
        profile = Profile.of(
            trainer.strategy,
            config,
            ddp,
            accelerator=getattr(trainer, "accelerator", "auto"),
            precision=precision_name(recipe, precision),
        )
        return TrainingFacts(
            recipe=recipe.log.name,
            arch=arch,
            knows_vocabulary=knows_vocabulary,
            layout=layout,
            profile=profile,
            seq_length=data.seq_length,
            global_batch=data.global_batch_size,
            steps=steps,
            computation=Computation(
                **Computation.of_model(config, has_experts=bool(arch.num_experts)),
                first_steps=first_steps if first_steps < steps else 0,
                overlap=("tp",) if getattr(overlaps, "tp_comm_overlap", False) else (),
                gradients=_gradients(recipe),
                low_params=any(
                    setting(recipe, f"trainer.plugins.{one}") for one in ("fp8_param_gather", "fp8_params")
                ),
                lora=setting(recipe, "peft.dim") or 0,
                software=DEFAULT_SOFTWARE,
            ),
            saving=Saving(
                weight_bytes=4 if precision.startswith("32") else WEIGHT_BYTES,
                every_n_steps=getattr(recipe.log.ckpt, "every_n_train_steps", None) or steps,
                setting=SAVE_EVERY.nemo,
                keeps=_kept(recipe.log.ckpt, steps),
                is_async=bool(setting(recipe, "trainer.strategy.ckpt_async_save")),
            ),
            rate=LearningRate(
                schedule=_schedule(recipe),
                is_constant=_is_rate_constant(recipe),
                peak=setting(recipe, LR.nemo),
                warmup_steps=setting(recipe, WARMUP.nemo) or 0,
            ),
            evaluations=next(_evaluations(callbacks), None),
            uses_wandb=bool(setting(recipe, "log.wandb")) and not setting(recipe, "log.wandb.offline"),
            positions=known.max_positions if (known := parent_within_reach(parent)) else None,
        )

    def shown_settings(self, parent: Parent) -> dict[str, Any]:
        """See `Training.shown_settings`."""
        values = shown_settings(self.recipe, self.name)
        if setting(self.recipe, "trainer.plugins.fp8"):
            values[FP8_RECIPE.nemo] = setting(self.recipe, FP8_RECIPE.nemo)
        return {name: value for name, value in values.items() if not isinstance(value, fdl.Buildable)}

    def check(self, stage: str) -> None:
        """See `Training.check`."""
        if not setting(self.recipe, "resume.restore_config.path"):
            raise SpecError(
                f"{stage}.resume.restore_config",
                kind="missing",
                got="names no dense checkpoint to start from",
                fix="make the recipe with upcycled(...), or a baseline with start_from(recipe, dense, None)",
            )
        check_recipe(self.recipe, f"{stage}.")
        if stage == "pretrain" and not self.recipe.resume.restore_config.spec:
            raise SpecError(
                "pretrain.resume.restore_config.spec",
                kind="missing",
                got="is missing, and the stage upcycles",
                fix="give the recipe of an upcycled model, such as nemo_upcycle.recipes.upcycled(recipe, dense, spec)",
            )

    def check_parent(self, stage: str, parent: Parent, *, remote: bool) -> None:
        """See `Training.check_parent`; the parent and the model must have the same sizes."""
        check_parent(self.recipe, parent, f"{stage}.", remote=remote)

    def check_here(self, stage: str) -> None:
        """See `Training.check_here`; checks nodes, GPUs and kernels."""
        from nemo_upcycle.trainers.nemo.starting import lacking_here

        if (nodes := ranks_of(self.recipe, f"{stage}.")[0]) > 1:
            raise SpecError(
                f"{stage}.trainer.num_nodes",
                got=nodes,
                expected="1 on this machine",
                fix="set it to 1, or name the cluster with run.executor=NAME",
            )
        if lacking := list(lacking_here(self.recipe, f"{stage}.", in_stage=True)):
            raise UpcycleError.together(lacking)

    def problems(self, stage: str, parent: Parent) -> tuple[UpcycleError, ...]:
        """See `Training.problems`."""
        return _problems(self, stage, parent)

    def seq_length(self, dense_folder: Path) -> int:
        """See `Training.seq_length`."""
        return int(self.recipe.data.seq_length)

    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """See `Training.spec`."""
        spec: UpcycleSpec = recipe_spec(self.recipe)
        return spec

    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """See `Training.model_config`; returns NeMo's configuration."""
        return model_config(self.recipe, read_architecture(dense_folder) if dense else None)

    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """See `Training.train`."""
        recipe = load_recipe(self.text)
        import nemo.utils  # only here: loading the recipe has imported NeMo without warnings

        from nemo_upcycle.cpu.backend import use_cpu_backend
        from nemo_upcycle.trainers.nemo.stopping import step_kept

        place_recipe(recipe, folder, dense_folder, data_folder)
        if skipped := skipped_samples(folder).ranges:
            recipe.data.skipped = [list(one) for one in skipped]
        spec = with_calibration(recipe_spec(recipe), folder, dense_folder)
        if spec and spec.calibration:
            recipe.resume.restore_config.spec.calibration = spec.calibration
        for callback in recipe.trainer.callbacks if suite else ():
            if _is(callback, "EvaluateWhileTraining"):
                callback.suite = str(suite)
        use_cpu_backend()  # before the model's configuration is built, because Megatron checks it at once
        if not is_verbose():  # show only errors on the console; NeMo's whole log is in a file of the folder
            nemo.utils.logging.set_verbosity(nemo.utils.logging.ERROR)
        ended_itself = True
        try:
            fdl.build(recipe)()
        except SystemExit:  # a signal told the training to stop, and it has saved
            ended_itself = False
        kept, wanted = step_kept(folder), recipe.trainer.max_steps
        if kept < wanted and (kept or not ended_itself):
            raise StageStopped.with_steps(folder.name, kept, wanted)
        return {"checkpoint": str(last_checkpoint(folder))} if is_first_rank() else {}


@lru_cache
def _problems(training: NeMoTraining, stage: str, parent: Parent) -> tuple[UpcycleError, ...]:
    from nemo_upcycle.trainers.nemo.starting import wrong_in

    def check() -> None:
        training.check(stage)
        training.check_parent(stage, parent, remote=False)

    def construct() -> list[UpcycleError]:
        return wrong_in(training.recipe, parent, f"{stage}: the training")

    return (*all_wrong(training.recipe, training.name, f"{stage}.", check, construct),)


def _is(callback: Any, name: str) -> bool:
    """Return whether a configured callback is this package's class of that name, without importing the class."""
    kind = callback.__fn_or_cls__
    return bool(kind.__name__ == name and kind.__module__.startswith("nemo_upcycle."))


def _model_of(recipe: Any, dense: Parent) -> tuple[Architecture, bool]:
    """Return the architecture that a recipe trains, and whether its vocabulary is known.

    If the vocabulary is not known, the architecture counts no embedding. The vocabulary size comes from the dense
    parent if the parent is a folder, else from the model's configuration, from a known parent of the same shape, or
    from the recipe's tokenizer.
    """
    config = recipe.model.config
    plain = architecture_of(config, 0)
    parent = dense.configured if dense.folder else None
    vocabulary = (parent.vocab_size if parent else None) or getattr(config, "vocab_size", None)
    if not vocabulary:
        known = (shape for _, shape in parents().values())
        vocabulary = next(
            (
                shape.vocab_size
                for shape in known
                if all(getattr(shape, name) == getattr(plain, name) for name in _SHAPE)
            ),
            None,
        )
    if not vocabulary:
        size = setting(recipe, "data.tokenizer.vocab_size")
        vocabulary = size + 1 if isinstance(size, int) else None  # NullTokenizer adds an end-of-document token
    return (architecture_of(config, vocabulary), True) if vocabulary else (plain, False)


def _gradients(recipe: Any) -> str:
    """Return the planner's name of the gradients' type; the precision's setting overrides the strategy's setting."""
    names = ("trainer.plugins.grad_reduce_in_fp32", "trainer.strategy.ddp.grad_reduce_in_fp32")
    values = [value for name in names if (value := setting(recipe, name)) is not None]
    return "bf16" if values and not values[0] else "fp32"


def _kept(checkpoint: Any, steps: int) -> int | None:
    """Return the number of checkpoints that a callback keeps at the end of a training; None: all."""
    if last := getattr(checkpoint, "keep_last", None):
        return count_kept(last, getattr(checkpoint, "keep_every", None), steps)
    best: int = getattr(checkpoint, "save_top_k", 1)
    return None if best < 0 else best + bool(getattr(checkpoint, "save_last", False))


def _evaluations(callbacks: list[Any]) -> Iterator[Evaluations]:
    for item in callbacks:
        if _is(item, "EvaluateWhileTraining"):
            yield Evaluations(
                suite=item.suite, every_n_steps=item.every_n_steps, limit=item.limit, batch_size=item.batch_size
            )


def _schedule(recipe: Any) -> str:
    """Describe the learning rate schedule."""
    scheduler, shape = setting(recipe, "optim.lr_scheduler"), "constant"
    if isinstance(scheduler, fdl.Buildable):
        given = ", ".join(f"{name}={value}" for name, value in sorted(scheduler.__arguments__.items()))
        shape = f"{scheduler.__fn_or_cls__.__name__}({given})"
    return f"lr={setting(recipe, 'optim.config.lr')}, {shape}"


def _is_rate_constant(recipe: Any) -> bool:
    lowest = setting(recipe, "optim.lr_scheduler.min_lr")
    return setting(recipe, "optim.lr_scheduler") is None or lowest == setting(recipe, "optim.config.lr")
