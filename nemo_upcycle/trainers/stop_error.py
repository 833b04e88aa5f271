"""The error that ends a training, with the command that rewinds the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_upcycle.errors import UpcycleError
from nemo_upcycle.sources.checkpoints import complete_checkpoints, steps_in
from nemo_upcycle.trainers.settings import AUX_LOSS, LR
from nemo_upcycle.trainers.stop_limits import StopReason
from nemo_upcycle.utils.command_line import COMMAND, CommandLine


def stop_error(reason: StopReason, folder: Path, trainer: str, *, rate: float, aux_loss: Any) -> UpcycleError:
    """Return the error that ends a training.

    The error prints the command that rewinds the training to the newest kept checkpoint before the first wrong step,
    with stronger balancing if experts are used unevenly, and otherwise with half the learning rate.

    Args:
        reason: why the training ends.
        folder: folder of the training, which may be inside a run's folder.
        trainer: `nemo` or `bridge`.
        rate: highest learning rate of the training.
        aux_loss: coefficient of the balancing loss, or a list of coefficients.
    """
    kept = [path for path in complete_checkpoints(folder / "checkpoints") if steps_in(path) < reason.first_step]
    if reason.is_balance and isinstance(aux_loss, int | float) and aux_loss > 0:
        change, changed = "a higher", {AUX_LOSS.of(trainer): f"{2 * aux_loss:g}"}
    else:
        change, changed = "a lower", {LR.of(trainer): f"{rate / 2:g}"}
    then = _rewind(folder, kept[-1] if kept else None, f"{change} {next(iter(changed))}", changed)
    if reason.first_step == reason.last_step:
        steps = f"of step {reason.last_step}"
        fix = (
            f"the last good checkpoint is {kept[-1] if kept else 'the dense checkpoint'}. Start again to resume from"
            f" it; if the {reason.what} fails at the same step again, {then}"
        )
        if kept:
            fix += f". To leave out the samples of this step, add --skip-steps {reason.last_step}"
    else:
        steps, fix = f"in steps {reason.first_step} to {reason.last_step}", then
    return UpcycleError(f"{reason.what} {steps}", got=reason.got, expected=reason.expected, fix=fix)


def _rewind(folder: Path, kept: Path | None, change: str, changed: dict[str, str]) -> str:
    """Return the advice to rewind a training; without a kept checkpoint, the advice to train in a new folder."""
    noted = folder.parent / COMMAND
    typed = CommandLine.read(noted.read_text(encoding="utf-8")) if noted.is_file() else None
    values = {f"{folder.name}.{name}": value for name, value in changed.items()}
    if typed and kept:
        place = f"{folder.name}:{steps_in(kept)}" if folder.name != "pretrain" else steps_in(kept)
        return f"rewind it with {change}: `{typed.changed(values, f'--rewind {place} --yes')}`"
    where = f": `{typed.changed({'dir': f'{folder.parent}-rewound'} | values)}`" if typed else ""
    return f"train in a new folder with {change}{where}"
