"""A training in Megatron-Bridge: a recipe by Bridge's naming, what it is changed by, and the ranks it takes."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from shutil import copyfile
from typing import Any

from nemo_upcycle.data.dense import cached_asset, tokenizer_folder
from nemo_upcycle.errors import StageStopped, UpcycleError
from nemo_upcycle.pipeline.console import is_verbose
from nemo_upcycle.pipeline.ranks import is_first_rank
from nemo_upcycle.pipeline.trainings import Profile, Training, TrainingSettings, last_checkpoint
from nemo_upcycle.planning.commands import fp8_precision
from nemo_upcycle.sources.checkpoints import newest_checkpoint, steps_in
from nemo_upcycle.spec import UpcycleSpec
from nemo_upcycle.utils.files import is_complete


#: What the result of a training does not depend on.
_FREE = (
    "logger.",
    "checkpoint.save_interval",
    "checkpoint.most_recent_k",
    "checkpoint.save_retain_interval",
    "checkpoint.async_save",
    "dataset.num_workers",
    "nodes",
    "ranks_per_node",
)


@dataclass(frozen=True)
class BridgeTraining(Training):
    """See `Training`.

    Args:
        recipe: a function's name in `nemo_upcycle.bridge.recipes`, or `package.module:function`.
        overrides: `KEY=VALUE`, as Bridge's command line takes them.
        nodes: that it runs on.
        ranks_per_node: GPUs of each.
    """

    recipe: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    ranks_per_node: int = 1

    @classmethod
    def from_text(cls, text: str) -> BridgeTraining:
        """Return the training of a text from `to_text`."""
        fields = json.loads(text)
        return cls(**fields | {"overrides": tuple(fields["overrides"])})

    def to_text(self) -> str:
        """Return the training as text. The same training gives the same text."""
        return json.dumps(asdict(self))

    @property
    def ranks(self) -> tuple[int, int]:
        """See `Training.ranks`."""
        return self.nodes, self.ranks_per_node

    def settings(self) -> TrainingSettings:
        """See `Training.settings`: those that were given; the recipe alone knows the others."""
        given = dict(setting.partition("=")[::2] for setting in self.overrides)
        own = {"recipe": self.recipe, "nodes": str(self.nodes), "ranks_per_node": str(self.ranks_per_node)}
        return TrainingSettings.sorted_by(
            own | given, steps="train.train_iters", free=_FREE, step0=("recipe", "model.")
        )

    def profile(self, dense: str) -> Profile | None:
        """See `Training.profile`: Bridge's recipes are complete with their parent's configuration alone."""
        from megatron.bridge.training.mixed_precision import get_mixed_precision_config

        folder = parent_configuration(dense)
        if folder is None:
            return None
        config = self.config(folder)
        precision = get_mixed_precision_config(config.mixed_precision or "bf16_mixed")
        is_fp8 = bool(precision.fp8)
        found = Profile.of(
            config.model,
            config.model,
            config.ddp,
            accelerator="auto",  # of one GPU, or this package's backend without any
            precision=fp8_precision(precision.fp8_recipe) if is_fp8 else "bf16",
        )
        overlap = getattr(config.comm_overlap, "overlap_moe_expert_parallel_comm", None)
        return replace(found, overlaps_experts=found.overlaps_experts or bool(overlap))

    def config(self, dense_folder: Path) -> Any:
        """Return the configuration of the recipe, with the overrides; the same object every time."""
        return _config(self, dense_folder)

    def seq_length(self, dense_folder: Path) -> int:
        """See `Training.seq_length`."""
        return int(self.config(dense_folder).dataset.seq_length)

    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """See `Training.spec`."""
        from nemo_upcycle.bridge.training import required_hook

        spec = required_hook(self.config(dense_folder)).spec
        if spec is None:
            raise UpcycleError("recipe", got=self.recipe, expected="an upcycled model's", fix="name another one")
        return spec

    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """See `Training.model_config`: Bridge's provider."""
        from nemo_upcycle.bridge.models import upcycled_provider

        model = self.config(dense_folder).model
        return upcycled_provider(dense_folder, None, seq_length=model.seq_length) if dense else model

    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """See `Training.train`; the live model is not scored."""
        from nemo_upcycle.bridge.training import CHECKPOINTS, place_config, run_config
        from nemo_upcycle.bridge.upcycling import RECEIPT
        from nemo_upcycle.cpu.backend import use_cpu_backend

        use_cpu_backend()  # before the model's configuration is made: Megatron checks it at once
        config = self.config(dense_folder)
        place_config(config, folder, data_folder)
        ended_itself = run_config(config, folder, verbose=is_verbose())
        if ended_itself and not is_first_rank():  # the first tells whether all is there
            return {}
        checkpoint, wanted = newest_checkpoint(folder / CHECKPOINTS), config.train.train_iters
        kept = steps_in(checkpoint) if checkpoint else 0
        if kept < wanted and (kept or not ended_itself):
            raise StageStopped.with_steps(folder.name, kept, wanted)
        if not is_first_rank():
            return {}
        checkpoint = checkpoint or last_checkpoint(folder)
        copyfile(folder / CHECKPOINTS / RECEIPT, folder / RECEIPT)  # where the report looks for it
        return {"checkpoint": str(checkpoint)}


@lru_cache
def parent_configuration(dense: str) -> Path | None:
    """Return a folder with a parent's configuration; None where it is not within reach. Asks a hub once.

    Args:
        dense: the parent's address.
    """
    scheme, _, name = dense.rpartition("://")
    if scheme == "asset" and not is_complete(cached_asset(name)):
        return None
    try:
        return tokenizer_folder(dense)
    except UpcycleError as error:  # a name on the hub: `check_address` opened any folder
        sys.stderr.write(f"Not checked against the dense parent: {error}\n")
        return None


@lru_cache
def _config(training: BridgeTraining, dense_folder: Path) -> Any:
    from nemo_upcycle.bridge.training import load_config

    return load_config(training.recipe, training.overrides, dense_folder)
