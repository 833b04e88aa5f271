"""Make the data of a run from texts or conversations, and open the data for later stages."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_upcycle.data.chat.finished import open_data
from nemo_upcycle.errors import StageError, StageStopped, UpcycleError
from nemo_upcycle.pipeline.inputs import Inputs
from nemo_upcycle.pipeline.markers import StageFolder
from nemo_upcycle.pipeline.plan import WorkPlan
from nemo_upcycle.trainers.settings import SEQUENCE


logger = logging.getLogger(__name__)
#: Size of the text sample for the step-0 check: number of windows B, and tokens per window S.
SAMPLE_WINDOWS, SAMPLE_WINDOW_TOKENS = 2, 256


def data_stage(run_dir: Path, plan: WorkPlan) -> dict[str, Any]:
    """Clean and tokenise the blend, or pack the conversations, with the parent's tokenizer.

    A finished folder is used in place.
    """
    dense_folder = dense_folder_of(run_dir)
    folder = data_folder_of(run_dir, plan)
    seq_length = _seq_length(plan, dense_folder)
    if not plan.inputs.is_finished:
        build_data(plan.inputs.data, str(dense_folder), folder, seq_length)
        _say_changes(plan.inputs, folder)
    data = open_data(folder)
    data.require_tokenizer_of(str(dense_folder))
    data.require_length(seq_length or data.manifest["seq_length"])  # fail before hours of other work
    if not any(data.held_out.values()):
        raise StageError(
            f"Folder {folder}",
            kind="missing",
            got="has no held-out documents, on which perplexity is measured",
            fix="name heldout files in the blend, or raise hold_out.heldout",
        )
    return made_data(folder, data.manifest)


def _seq_length(plan: WorkPlan, dense_folder: Path) -> int | None:
    """Return the tokens per sequence; None without a training. Load a recipe only if no setting gives the number."""
    if known := plan.training_settings("pretrain").fixed.get(SEQUENCE.of(plan.trainer)):
        return int(known)
    training = plan.training("pretrain")
    return training.seq_length(dense_folder) if training else None


def made_data(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Describe finished data in the form of a data stage's marker."""
    splits = manifest["splits"]
    return {"folder": str(folder), "tokens": {name: split["tokens"] for name, split in splits.items()}}


def build_data(data: str, dense: str, folder: Path, seq_length: int | None) -> None:
    """Build a blend (or resume a stopped build), or pack conversations.

    Args:
        data: name or path of the blend or the conversations.
        dense: dense model whose tokenizer is used.
        folder: folder to write.
        seq_length: tokens per sequence; if None, the number in the data's configuration.

    Raises:
        StageStopped: a signal stopped the build; it can resume.
    """
    from nemo_upcycle.data.blend import read_blend
    from nemo_upcycle.data.build import build_blend
    from nemo_upcycle.data.chat.build_chat import build_chat
    from nemo_upcycle.data.chat.config import is_chat, read_chat

    settings = [f"tokenizer={dense}", *([f"seq_length={seq_length}"] if seq_length else [])]
    if is_chat(data):
        build_chat(read_chat(data, settings), folder)
        return
    try:
        build_blend(read_blend(data, settings), folder)
    except KeyboardInterrupt:  # a signal stopped the engine
        text = "stage 'data' stopped early: its finished tasks are kept, and the same command resumes from there"
        raise StageStopped(text) from None


def _say_changes(inputs: Inputs, folder: Path) -> None:
    """Warn about files that changed since the data of a run were made. The run continues with its present data."""
    from nemo_upcycle.data.build import changed_files
    from nemo_upcycle.data.made_from import changes_text

    try:
        changes = changed_files(inputs.blend, folder) if inputs.blend else {}
    except UpcycleError as error:
        logger.warning("[data] cannot check whether the files of %s changed since it was built: %s", folder, error)
        return
    if changes:
        logger.warning(
            "[data] %s. The run continues with its old texts. To train on the changed files, give another dir=",
            changes_text(changes, folder),
        )


def data_folder_of(run_dir: Path, plan: WorkPlan) -> Path:
    """Return the folder of the finished data: the user's own, or the folder that the data stage writes."""
    return Path(plan.inputs.data) if plan.inputs.is_finished else run_dir / "data" / "blend"


def dense_folder_of(run_dir: Path) -> Path:
    """Return the dense parent's folder, as the import stage reported it."""
    return Path(StageFolder(run_dir, "import").outputs()["dense_folder"])


def sample_tokens(folder: Path) -> Any:
    """Return the validation tokens for the step-0 check, [B, S].

    Raises:
        StageError: the validation split has too few tokens.
    """
    import torch

    wanted, parts = SAMPLE_WINDOWS * SAMPLE_WINDOW_TOKENS, [torch.zeros(0, dtype=torch.int64)]
    for tokens in open_data(folder).validation_tokens():
        if sum(map(len, parts)) < wanted:
            parts.append(torch.from_numpy(tokens.astype("int64")))
    if len(tokens := torch.cat(parts)) < wanted:
        raise StageError(
            "The validation split",
            kind="state",
            got=f"has {len(tokens)} tokens, fewer than {wanted}",
            fix="give the data a longer validation split",
        )
    return tokens[:wanted].view(SAMPLE_WINDOWS, SAMPLE_WINDOW_TOKENS)


def require_data(plan: WorkPlan, folder: Path) -> None:
    """Check that a run's data are complete, and warn about files that changed after the data were made.

    Raises:
        UpcycleError: a file is missing, or has another size.
    """
    if not plan.inputs.is_finished:
        open_data(folder)
        _say_changes(plan.inputs, folder)


def data_files(folder: Path) -> list[Path]:
    """Return the files that identify data to other stages: the files that trainings read, and the held-out texts."""
    return [path for name in open_data(folder).files if (path := folder / name).is_file()]
