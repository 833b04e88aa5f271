"""What a run of NeMo or Megatron-Bridge reads of a finished blend, and how often each source."""

from __future__ import annotations

from pathlib import Path

from nemo_upcycle.data.finished import MANIFEST, FinishedBlend
from nemo_upcycle.utils.files import sha256_file
from nemo_upcycle.utils.progress import show_messages


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


def say_what_is_read(blend: FinishedBlend, steps: int, step_tokens: int) -> None:
    """Log what a run reads, and warn where it reads a source more often than the blend's `max_epochs`."""
    messages = show_messages()
    messages.info("%s", blend.describe(steps, step_tokens))
    limit = blend.manifest["max_epochs"]
    for source, epochs in blend.epochs(steps * step_tokens).items():
        if epochs > limit:
            text = "data: source %s is read %.1f times, more often than max_epochs (%g): lower its weight or the steps"
            messages.warning(text, source, epochs, limit)
