"""A training in NeMo: a recipe of NeMo-Run's, and what runs it in the folder of a stage."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_upcycle.errors import StageStopped
from nemo_upcycle.pipeline.console import is_verbose
from nemo_upcycle.pipeline.ranks import is_first_rank
from nemo_upcycle.pipeline.recipes_io import load_recipe, model_config, place_recipe, ranks_of, settings, spec_of
from nemo_upcycle.pipeline.trainings import Profile, Training, TrainingSettings, last_checkpoint
from nemo_upcycle.spec import UpcycleSpec


#: What the result of a training does not depend on.
_FREE = ("log.", "trainer.log_every_n_steps", "trainer.num_nodes", "trainer.devices", "data.num_workers")


@dataclass(frozen=True)
class NeMoTraining(Training):
    """See `Training`.

    Args:
        text: the serialised recipe.
    """

    text: str

    @cached_property
    def recipe(self) -> Any:
        """The recipe; the same object every time, so not to be changed."""
        return load_recipe(self.text)

    @property
    def ranks(self) -> tuple[int, int]:
        """See `Training.ranks`."""
        return ranks_of(self.recipe)

    @property
    def script(self) -> str | None:
        """See `Training.script`."""
        if any(value.startswith("__main__.") for _, value in settings(self.recipe)):
            return str(Path(sys.modules["__main__"].__file__ or "").absolute())
        return None

    def settings(self) -> TrainingSettings:
        """See `Training.settings`."""
        return TrainingSettings.sorted_by(
            dict(settings(self.recipe)),
            steps="trainer.max_steps",
            free=_FREE,
            step0=("model.", "resume.restore_config.spec."),
        )

    def profile(self, dense: str) -> Profile:
        """See `Training.profile`."""
        from nemo_upcycle.pipeline.forecast.planned import precision_name

        trainer, model = self.recipe.trainer, self.recipe.model.config
        return Profile.of(
            trainer.strategy,
            model,
            getattr(trainer.strategy, "ddp", None),
            accelerator=getattr(trainer, "accelerator", "auto"),
            precision=precision_name(self.recipe),
        )

    def seq_length(self, dense_folder: Path) -> int:
        """See `Training.seq_length`."""
        return int(self.recipe.data.seq_length)

    def spec(self, dense_folder: Path) -> UpcycleSpec:
        """See `Training.spec`."""
        spec: UpcycleSpec = spec_of(self.recipe)
        return spec

    def model_config(self, dense_folder: Path, *, dense: bool) -> Any:
        """See `Training.model_config`: NeMo's."""
        return model_config(self.recipe, dense=dense)

    def planned(self, dense: str, card: str) -> dict[str, float] | None:
        """See `Training.planned`."""
        from nemo_upcycle.pipeline.forecast.planned import planned_of

        return planned_of(self.recipe, dense, card)

    def train(
        self, folder: Path, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
    ) -> dict[str, Any]:
        """See `Training.train`."""
        import fiddle as fdl
        import nemo.utils

        from nemo_upcycle.cpu.backend import use_cpu_backend

        recipe = load_recipe(self.text)
        from nemo_upcycle.training.evaluating import EvaluateWhileTraining
        from nemo_upcycle.training.stopping import step_kept  # after NeMo, which the recipe imports without warnings

        place_recipe(recipe, folder, dense_folder, data_folder)
        for callback in recipe.trainer.callbacks if suite else ():
            if callback.__fn_or_cls__ is EvaluateWhileTraining:
                callback.suite = str(suite)
        use_cpu_backend()  # before the model's configuration is built: Megatron checks it at once
        if not is_verbose():  # show only errors on the console; NeMo writes its whole log to a file in the folder
            nemo.utils.logging.set_verbosity(nemo.utils.logging.ERROR)
        ended_itself = True
        try:
            fdl.build(recipe)()
        except SystemExit:  # it was told to stop, and has saved
            ended_itself = False
        kept, wanted = step_kept(folder), recipe.trainer.max_steps
        if kept < wanted and (kept or not ended_itself):
            raise StageStopped.with_steps(folder.name, kept, wanted)
        return {"checkpoint": str(last_checkpoint(folder))} if is_first_rank() else {}
