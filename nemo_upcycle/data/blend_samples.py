"""What a run of NeMo or Megatron-Bridge reads of a finished blend, and how often each source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.data.finished import MANIFEST, FinishedBlend
from nemo_upcycle.utils.files import sha256_file
from nemo_upcycle.utils.progress import show_messages
from nemo_upcycle.utils.ranks import is_first_rank


#: The folder, in that of the blend, in which Megatron keeps the order of the samples.
INDICES = "indices"


def index_folder(blend: FinishedBlend, indices: str | None) -> Path:
    """Return where Megatron keeps the order of a blend's samples: in the blend's folder, or in one of many blends."""
    if not indices:
        return blend.folder / INDICES
    return Path(indices).absolute() / sha256_file(blend.folder / MANIFEST)[:16]


def describe_blend(blend: FinishedBlend) -> str:
    """Return in a few words what a run is trained on, for its report."""
    return f"blend {blend.name} ({blend.folder.name}){blend.contamination}"


def say_what_is_read(blend: FinishedBlend, steps: int, step_tokens: int, parent_tokens: int = 0) -> None:
    """Log what a run reads, and warn where a source is read more often than the blend's `max_epochs`.

    Args:
        blend: what it reads of.
        steps: of the run.
        step_tokens: tokens of a step, over all ranks.
        parent_tokens: that its parent has read of the same order; with them a source is read more often.
    """
    messages = show_messages()
    messages.info("%s", blend.describe(steps, step_tokens))
    if parent_tokens:
        messages.info("  its parent read %s tokens of it before", f"{parent_tokens:,}")
    limit, also = blend.manifest["max_epochs"], " with its parent's reading" if parent_tokens else ""
    for source, epochs in blend.epochs(parent_tokens + steps * step_tokens).items():
        if epochs > limit:
            text = (
                "data: source %s is read %.1f times%s, more often than max_epochs (%g): lower its weight or the steps"
            )
            messages.warning(text, source, epochs, also, limit)


def clamp_interval(trainer: Any) -> None:
    """Let a trainer of Lightning's validate at the latest in the step after its last one, and say that none is left.

    Lightning refuses an interval above the length of the data. After one of as many steps as the run has, NeMo leaves
    the last checkpoint to the validation, which may write none.

    Args:
        trainer: Lightning's, not started; an interval that is a fraction of the data stays.
    """
    interval, steps = trainer.val_check_interval, trainer.max_steps
    if isinstance(interval, int) and interval > steps:
        trainer.val_check_interval = steps + 1
        if trainer.limit_val_batches and is_first_rank():
            text = "validation: none in %d steps, trainer.val_check_interval is %d; for one set it to %d or less"
            show_messages().info(text, steps, interval, steps)
