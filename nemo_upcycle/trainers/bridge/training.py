"""A training in Megatron-Bridge: the name of a recipe, overrides of its settings, and the number of ranks.

The module can be imported without Bridge; functions that need Bridge import it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from shutil import copyfile
from types import SimpleNamespace
from typing import Any

from nemo_upcycle.errors import StageStopped, UpcycleError
from nemo_upcycle.models.hf_config import read_architecture
from nemo_upcycle.models.megatron_config import architecture_of
from nemo_upcycle.planning.hardware import BRIDGE_SOFTWARE
from nemo_upcycle.planning.parameters import WEIGHT_BYTES
from nemo_upcycle.planning.workload import OPTIMIZERS
from nemo_upcycle.sources.checkpoints import full_disk, newest_checkpoint, steps_in
from nemo_upcycle.sources.fetch import cached_asset, tokenizer_folder
from nemo_upcycle.sources.find import Parent
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.trainers.base import Training, last_checkpoint
from nemo_upcycle.trainers.bridge import require_bridge
from nemo_upcycle.trainers.commands import fp8_precision
from nemo_upcycle.trainers.facts import Computation, Evaluations, LearningRate, Profile, Saving, TrainingFacts
from nemo_upcycle.trainers.kept_checkpoints import count_kept
from nemo_upcycle.trainers.layout import check_layout, layout_of
from nemo_upcycle.trainers.lineage import has_new_rates, skipped_samples
from nemo_upcycle.trainers.run_calibration import with_calibration
from nemo_upcycle.trainers.settings import SAVE_EVERY, STEPS, all_wrong, check_packs, check_values, shown_settings
from nemo_upcycle.utils.console import is_verbose
from nemo_upcycle.utils.files import is_complete
from nemo_upcycle.utils.ranks import is_first_rank


@dataclass(frozen=True)
class BridgeTraining(Training):
    """See `Training`.

    Args:
        recipe: name of a function in `nemo_upcycle.recipes`, or `package.module:function`.
        overrides: `KEY=VALUE`, as Bridge's command line takes them.
        nodes: number of machines.
        ranks_per_node: number of GPUs on each machine.
        evaluations: evaluations during training; None: the recipe's evaluations.
        changes: JSON with new values for fields of the recipe's spec; `null` trains the dense baseline, without spec.
    """

    name = "bridge"

    recipe: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 1
    evaluations: Evaluations | None = None
    changes: str = "{}"

    @classmethod
    def from_text(cls, text: str) -> BridgeTraining:
        """Return the training that a text from `to_text` describes."""
        fields = json.loads(text)
        evaluations = fields.pop("evaluations", None)
        fields["overrides"] = tuple(fields["overrides"])
        return cls(**fields, evaluations=Evaluations(**evaluations) if evaluations else None)

    def to_text(self) -> str:
        """Return the training as text. Equal trainings give equal texts."""
        return json.dumps(asdict(self))

    @property
    def reads_chat(self) -> bool:
        """See `Training.reads_chat`."""
        return _reads_chat(self.recipe)

    @property
    def ranks(self) -> tuple[int, int]:
        """See `Training.ranks`."""
        return self.nodes, self.ranks_per_node

    def named_settings(self) -> dict[str, str]:
        """See `Training.named_settings`; lists only the given settings, because only the recipe knows the others."""
        given = dict(word.partition("=")[::2] for word in self.overrides)
        given |= {f"spec.{name}": str(value) for name, value in (json.loads(self.changes) or {}).items()}
        return {"recipe": self.recipe, "nodes": str(self.nodes), "ranks_per_node": str(self.ranks_per_node)} | given

    def facts(self, parent: Parent) -> TrainingFacts | None:
        """See `Training.facts`; a Bridge recipe is complete once its parent's configuration is known."""
        folder = parent_configuration(parent)
        if folder is None:
            return None
        config = self.config(folder)
        from nemo_upcycle.trainers.bridge.settings import mixed_precision_of, settings_of

        model, steps, overlap = config.model, config.train.train_iters, config.comm_overlap
        numbers, newest = mixed_precision_of(config), config.checkpoint.most_recent_k
        layout = layout_of(model, self.nodes * self.ranks_per_node, config.train.micro_batch_size)
        precision = _precision(config)
        profile = Profile.of(
            model,
            model,
            config.ddp,
            accelerator="auto",  # one GPU, or this package's CPU backend
            precision=precision,
        )
        overlaps_experts = profile.overlaps_experts or bool(getattr(overlap, "overlap_moe_expert_parallel_comm", None))
        profile = replace(profile, overlaps_experts=overlaps_experts)
        shares = {"tp": getattr(overlap, "tp_comm_overlap", False), "ep": overlaps_experts}
        shares["launch"] = getattr(model, "cuda_graph_impl", None) == "full_iteration"
        rate, lowest, style = config.optimizer.lr, config.optimizer.min_lr, config.scheduler.lr_decay_style
        warmup = config.scheduler.lr_warmup_iters
        arch = architecture_of(model, model.vocab_size)
        return TrainingFacts(
            recipe=self.recipe,
            arch=arch,
            knows_vocabulary=True,
            layout=layout,
            profile=profile,
            seq_length=config.dataset.seq_length,
            global_batch=config.train.global_batch_size,
            steps=steps,
            computation=Computation(
                **Computation.of_model(model, has_experts=bool(arch.num_experts)),
                overlap=tuple(name for name, is_on in shares.items() if is_on),
                gradients="fp32" if (numbers or config.ddp).grad_reduce_in_fp32 else "bf16",
                optimizer=_optimizer(config.optimizer),
                low_params=any(getattr(numbers, name, False) for name in ("fp8_param_gather", "fp4_param_gather")),
                software=BRIDGE_SOFTWARE,
            ),
            saving=Saving(
                weight_bytes=4 if precision == "32" else WEIGHT_BYTES,
                every_n_steps=config.checkpoint.save_interval or steps,
                setting=SAVE_EVERY.bridge,
                keeps=count_kept(newest, settings_of(config).keep_every, steps) if newest > -1 else None,
                is_async=config.checkpoint.async_save,
            ),
            rate=LearningRate(
                schedule=f"lr={rate}, {style}(min_lr={lowest}, warmup_steps={warmup})",
                is_constant=style == "constant" or lowest == rate,
                peak=rate,
                warmup_steps=warmup or 0,
            ),
            evaluations=self.evaluations or settings_of(config).evaluations(),
            uses_wandb=bool(config.logger.wandb_project),
            positions=read_architecture(folder).max_positions,
        )

    def shown_settings(self, parent: Parent) -> dict[str, Any]:
        """See `Training.shown_settings`; lists only the given settings if the parent is out of reach."""
        folder = parent_configuration(parent)
        if folder is None:
            return dict(self.named_settings())
        config = self.config(folder)
        return shown_settings(config, self.name) | {"precision": _precision(config)}

    def check(self, stage: str) -> None:
        """See `Training.check`; the recipe must exist and steps must be a number. The other checks need the parent."""
        require_bridge()
        from nemo_upcycle.trainers.bridge.config import find_recipe

        find_recipe(self.recipe)
        steps = self.named_settings().get(STEPS.bridge, "0")
        if not steps.isdecimal():
            raise UpcycleError(STEPS.bridge, got=f"'{steps}'", expected="a number", fix="give a number")

    def check_parent(self, stage: str, parent: Parent, *, remote: bool) -> None:
        """See `Training.check_parent`; with the parent's configuration, the recipe is complete and can be checked."""
        folder = tokenizer_folder(parent.address) if remote else parent_configuration(parent)
        if folder is not None:
            _check_config(self, stage, folder)

    def check_here(self, stage: str) -> None:
        """See `Training.check_here`; checks nodes, and the package for FP8 statistics."""
        from nemo_upcycle.trainers.monitoring.fp8_statistics import require_inspect

        name = "upcycle.fp8_statistics_every"
        every = self.named_settings().get(name, "")
        require_inspect(int(every) if every.isdecimal() else 0, f"{stage}.{name}")
        if self.nodes > 1:
            raise UpcycleError(
                "gpus",
                kind="refused",
                got=f"of recipe {self.recipe} is {self.nodes * self.ranks_per_node}, more than one machine",
                fix="give gpus=1, or name the cluster with run.executor=NAME",
            )

    def problems(self, stage: str, parent: Parent) -> tuple[UpcycleError, ...]:
        """See `Training.problems`; finds none if the parent's configuration is out of reach."""
        return _problems(self, stage, parent)

    def config(self, dense_folder: Path) -> Any:
        """Return the recipe's configuration with the overrides; every call returns the same object."""
        return _config(self, dense_folder)

    def seq_length(self, dense_folder: Path) -> int:
        """See `Training.seq_length`."""
        return int(self.config(dense_folder).dataset.seq_length)

    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """See `Training.spec`."""
        spec = self.config(dense_folder).spec
        assert isinstance(spec, UpcycleSpec)  # `check` refuses a pretraining that does not upcycle
        return spec

    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """See `Training.model_config`; returns Bridge's provider."""
        model = self.config(dense_folder).model
        from nemo_upcycle.trainers.bridge.models import upcycled_provider

        return upcycled_provider(dense_folder, None, seq_length=model.seq_length) if dense else model

    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """See `Training.train`."""
        require_bridge()
        from nemo_upcycle.cpu.backend import use_cpu_backend
        from nemo_upcycle.trainers.bridge.config import CHECKPOINTS, place_config, run_config
        from nemo_upcycle.trainers.bridge.run_folder import RECEIPT

        use_cpu_backend()  # before the model's configuration is made, because Megatron checks it at once
        config = self.config(dense_folder)
        place_config(config, folder, data_folder)
        config.dataset.skipped = [list(one) for one in skipped_samples(folder).ranges]
        if has_new_rates(folder):
            config.scheduler.override_opt_param_scheduler = True
            config.scheduler.use_checkpoint_opt_param_scheduler = False
        if node := config.upcycling:
            node.change(with_calibration(node.spec, folder, dense_folder))
        evaluations = self.evaluations
        if evaluations and suite:
            evaluations = replace(evaluations, suite=str(suite))
        try:
            ended_itself = run_config(config, folder, evaluations=evaluations, verbose=is_verbose())
        except BaseException as error:  # torch's CheckpointException is not an Exception
            if full := full_disk(error, folder / CHECKPOINTS):
                raise full from None
            raise
        if ended_itself and not is_first_rank():  # only the first rank looks for the last checkpoint
            return {}
        checkpoint, wanted = newest_checkpoint(folder / CHECKPOINTS), config.train.train_iters
        kept = steps_in(checkpoint) if checkpoint else 0
        if kept < wanted and (kept or not ended_itself):
            raise StageStopped.with_steps(folder.name, kept, wanted)
        if not is_first_rank():
            return {}
        checkpoint = checkpoint or last_checkpoint(folder)
        copyfile(folder / CHECKPOINTS / RECEIPT, folder / RECEIPT)  # the report looks for the receipt there
        return {"checkpoint": str(checkpoint)}


@lru_cache
def _problems(training: BridgeTraining, stage: str, parent: Parent) -> tuple[UpcycleError, ...]:
    folder = parent_configuration(parent)
    if folder is None:
        return ()
    config = training.config(folder)
    from nemo_upcycle.trainers.bridge.starting import wrong_in

    def construct() -> list[UpcycleError]:
        layout = layout_of(config.model, training.nodes * training.ranks_per_node, config.train.micro_batch_size)
        return wrong_in(config, layout, f"{stage}: the training")

    check = partial(_check_config, training, stage, folder)
    return (*all_wrong(config, training.name, f"{stage}.", check, construct),)


@lru_cache
def parent_configuration(parent: Parent) -> Path | None:
    """Return a folder with a parent's configuration; None if it is out of reach. Ask a hub only once.

    Args:
        parent: the dense parent.
    """
    scheme, _, name = parent.address.rpartition("://")
    if scheme == "asset" and not is_complete(cached_asset(name)):
        return None
    try:
        return tokenizer_folder(parent.address)
    except UpcycleError as error:  # the parent is on the hub, because `Parent` has already opened any folder
        sys.stderr.write(f"Not checked against the dense parent: {error}\n")
        return None


def required_parent(parent: Parent) -> Path:
    """Return a folder with a parent's configuration; fetch the configuration if necessary."""
    return parent_configuration(parent) or tokenizer_folder(parent.address)


@lru_cache
def _reads_chat(recipe: str) -> bool:
    require_bridge()
    from nemo_upcycle.trainers.bridge.config import tunes

    return tunes(recipe)


@lru_cache
def _config(training: BridgeTraining, dense_folder: Path) -> Any:
    require_bridge()
    from nemo_upcycle.trainers.bridge.config import load_config

    return load_config(training.recipe, training.overrides, dense_folder, json.loads(training.changes))


def _precision(config: Any) -> str:
    """Return the planner's name of a configuration's precision."""
    from nemo_upcycle.trainers.bridge.settings import mixed_precision_of

    precision = mixed_precision_of(config)
    if precision is None:
        return "bf16" if config.model.bf16 else "32"
    if precision.fp4:
        return fp8_precision(precision.fp4_recipe)
    return fp8_precision(precision.fp8_recipe) if precision.fp8 else "bf16"


def _optimizer(optimizer: Any) -> str:
    """Return the planner's name of an optimizer; Adam for an optimizer that the planner does not know."""
    name = optimizer.optimizer
    if name == "muon" and getattr(optimizer, "use_layer_wise_distributed_optimizer", False):
        return "dist_muon"
    return name if name in OPTIMIZERS else "adam"


def _check_config(training: BridgeTraining, stage: str, dense_folder: Path) -> None:
    config = training.config(dense_folder)
    from nemo_upcycle.trainers.bridge.settings import settings_of
    from nemo_upcycle.trainers.bridge.upcycling import check

    check_values(config, training.name, f"{stage}.")
    if stage in ("pretrain", "dense_ct") and (config.spec is None) != (stage == "dense_ct"):  # arms may upcycle or not
        wanted = "a recipe of a dense baseline" if stage == "dense_ct" else "a recipe that upcycles"
        name = "dense_ct" if stage == "dense_ct" else "recipe"
        raise UpcycleError(name, got=training.recipe, expected=wanted, fix="name another recipe")
    if config.model.seq_length != config.dataset.seq_length:
        raise UpcycleError(
            f"{stage}.model.seq_length",
            got=config.model.seq_length,
            expected=f"{config.dataset.seq_length}, as dataset.seq_length",
            fix="set both to the same length",
        )
    data = SimpleNamespace(
        seq_length=config.dataset.seq_length,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
    )
    if training.reads_chat:
        check_packs(config, training.name, f"{stage}.")
    ranks = training.nodes * training.ranks_per_node
    settings = settings_of(config)
    try:
        settings.check()
    except UpcycleError as error:
        raise error.renamed(lambda name: f"{stage}.upcycle.{name}") from None
    try:
        check_layout(config.model, config.model, data, ranks, training.name, _precision(config))
        check(config)
    except UpcycleError as error:
        raise error.renamed(lambda name: f"{stage}.{name}".replace(".config.", ".") if "." in name else name) from None
