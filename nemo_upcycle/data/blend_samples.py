"""The samples that a run of NeMo or Megatron-Bridge reads of a finished blend: enough, and how often each source."""

from __future__ import annotations

from pathlib import Path

from nemo_upcycle.data.finished import MANIFEST, FinishedBlend
from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.utils.files import sha256_file
from nemo_upcycle.utils.progress import show_messages


#: The folder, in that of the blend, in which Megatron keeps the order of the samples.
INDICES = "indices"


def require_samples(
    max_steps: int,
    global_batch_size: int,
    seq_length: int,
    num_train_samples: int,
    *,
    steps: str = "trainer.max_steps",
    run_tokens: str = "data.run_tokens",
) -> None:
    """Check that a run is not longer than the order of its samples.

    Args:
        max_steps: of the run.
        global_batch_size: sequences of a step.
        seq_length: tokens of a sequence.
        num_train_samples: sequences that are laid out.
        steps: the setting of the steps, for the text of the error.
        run_tokens: the setting of the tokens of the longest run, likewise.

    Raises:
        UpcycleError: it is.
    """
    if (needed := max_steps * global_batch_size) > num_train_samples:
        raise UpcycleError(
            steps,
            got=f"{max_steps}, which read {needed:,} sequences of {seq_length} tokens",
            expected=f"at most {num_train_samples // global_batch_size}, to read {num_train_samples:,} sequences",
            fix=(
                f"lower it, or set {run_tokens}={needed * seq_length}, which reads the data as often as needed, "
                "in another order: runs to compare need the same run_tokens"
            ),
        )


def index_folder(blend: FinishedBlend, indices: str | None) -> Path:
    """Return where Megatron keeps the order of a blend's samples: in the blend's folder, or in one of many blends."""
    if not indices:
        return blend.folder / INDICES
    return Path(indices).absolute() / sha256_file(blend.folder / MANIFEST)[:16]


def describe_blend(blend: FinishedBlend) -> str:
    """Return in a few words what a run is trained on, for its report."""
    return f"blend {blend.name} ({blend.folder.name}){blend.contamination}"


def say_what_is_read(blend: FinishedBlend, steps: int, step_tokens: int) -> None:
    """Log what a run reads, and warn where it reads a source more often than the blend's `max_epochs`."""
    messages = show_messages()
    messages.info("%s", blend.describe(steps, step_tokens))
    limit = blend.manifest["max_epochs"]
    for source, epochs in blend.epochs(steps * step_tokens).items():
        if epochs > limit:
            text = "data: source %s is read %.1f times, more often than max_epochs (%g): lower its weight or the steps"
            messages.warning(text, source, epochs, limit)
