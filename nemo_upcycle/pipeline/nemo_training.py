"""The training of a stage, in the folder of the stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.errors import StageError, StageStopped
from nemo_upcycle.pipeline.console import is_verbose
from nemo_upcycle.pipeline.ranks import is_first_rank
from nemo_upcycle.sources.checkpoints import newest_checkpoint


def train(
    folder: Path, serialised: str, dense_folder: Path, data_folder: Path, *, suite: Path | None = None
) -> dict[str, Any]:
    """Train on all ranks of a job, in the folder of the stage; go on where an earlier start stopped.

    Args:
        folder: of the stage, for logs and checkpoints.
        serialised: the recipe.
        dense_folder: the dense parent.
        data_folder: a finished folder of `nemo-upcycle data`.
        suite: the folder of the suite that scores the live model, where the recipe has a callback for it.

    Returns:
        On the first rank the last `checkpoint`.

    Raises:
        StageStopped: it was told to stop, and can go on.
        StageError: it left no checkpoint.
    """
    import fiddle as fdl
    import nemo.utils

    from nemo_upcycle.cpu.backend import use_cpu_backend
    from nemo_upcycle.pipeline.recipes_io import load_recipe, place_recipe

    recipe = load_recipe(serialised)
    from nemo_upcycle.training.evaluating import EvaluateWhileTraining
    from nemo_upcycle.training.stopping import step_kept  # after NeMo, which the recipe imports without its warnings

    place_recipe(recipe, folder, dense_folder, data_folder)
    for callback in recipe.trainer.callbacks if suite else ():
        if callback.__fn_or_cls__ is EvaluateWhileTraining:
            callback.suite = str(suite)
    use_cpu_backend()  # before the model's configuration is built: Megatron checks it at once
    if not is_verbose():  # show only errors on the console; NeMo writes its whole log to a file in the stage's folder
        nemo.utils.logging.set_verbosity(nemo.utils.logging.ERROR)
    ended_itself = True
    try:
        fdl.build(recipe)()
    except SystemExit:  # it was told to stop, and has saved
        ended_itself = False
    kept, wanted = step_kept(folder), recipe.trainer.max_steps
    if kept < wanted and (kept or not ended_itself):
        kept_text = f"{kept} of {wanted} steps are kept"
        raise StageStopped(
            f"stage '{folder.name}' stopped early: {kept_text}, and the same command goes on from there"
        )
    return {"checkpoint": str(last_checkpoint(folder))} if is_first_rank() else {}


def last_checkpoint(folder: Path) -> Path:
    """Return the checkpoint of the highest step that NeMo left in a training stage's folder.

    Raises:
        StageError: there is none.
    """
    checkpoint = newest_checkpoint(folder / "checkpoints")
    if checkpoint is None:
        raise StageError(
            f"checkpoint in {folder}", got="none", expected="a finished checkpoint", fix="run the stage again"
        )
    return checkpoint
