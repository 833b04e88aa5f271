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

    The error prints the command that rewinds the training to the newest kept checkpoint before the first wrong step.
    The command leaves out the samples of a single wrong step. Otherwise it strengthens the balancing if experts are
    used unevenly, and halves the learning rate if not.

    Args:
        reason: why the training ends.
        folder: folder of the training, which may be inside a run's folder.
        trainer: `nemo` or `bridge`.
        rate: highest learning rate of the training.
        aux_loss: coefficient of the balancing loss, or a list of coefficients.
    """
    if reason.is_balance and isinstance(aux_loss, int | float) and aux_loss > 0:
        change, name, value = "a higher", AUX_LOSS.of(trainer), f"{2 * aux_loss:g}"
    else:
        change, name, value = "a lower", LR.of(trainer), f"{rate / 2:g}"
    is_one_step = reason.first_step == reason.last_step
    first, options = reason.first_step, [f"--skip-steps {reason.first_step}"] if is_one_step else []
    command = rewind_command(folder, first, *options, **({} if is_one_step else {name: value}))
    if not command:
        fix = _in_a_new_folder(folder, f"{change} {name}", {name: value})
    elif is_one_step:
        then = f"if a later step fails, too, add {folder.name}.{name}={value}"
        fix = f"leave out the samples of this step: `{command}`; {then}"
    else:
        fix = f"rewind it with {change} {name}: `{command}`"
    if not is_one_step:
        return UpcycleError(
            f"{reason.what} in steps {first} to {reason.last_step}", got=reason.got, expected=reason.expected, fix=fix
        )
    good = newest_before(folder, first) or "the dense checkpoint"
    again = f"the last good checkpoint is {good}. Start again to resume from it; if step {first} fails again, {fix}"
    return UpcycleError(f"{reason.what} of step {first}", got=reason.got, expected=reason.expected, fix=again)


def rewind_command(folder: Path, first_step: int, *options: str, **values: str) -> str | None:
    """Return the command that rewinds a training to its newest kept checkpoint before a step.

    Args:
        folder: folder of the training, which may be inside a run's folder.
        first_step: first step that the training repeats or leaves out.
        options: further options, such as `--skip-steps 9`.
        values: changed settings of the training, by their names.

    Returns:
        The command; None if no checkpoint was kept, or if the training was not started by the pipeline's command.
    """
    typed, kept = _typed(folder), newest_before(folder, first_step)
    if not typed or not kept:
        return None
    place = f"{folder.name}:{steps_in(kept)}" if folder.name != "pretrain" else steps_in(kept)
    changes = {f"{folder.name}.{name}": value for name, value in values.items()}
    return str(typed.changed(changes, " ".join((f"--rewind {place}", *options, "--yes"))))


def newest_before(folder: Path, step: int) -> Path | None:
    """Return the newest complete checkpoint of a training before a step; None if there is none."""
    kept = [path for path in complete_checkpoints(folder / "checkpoints") if steps_in(path) < step]
    return kept[-1] if kept else None


def _in_a_new_folder(folder: Path, change: str, values: dict[str, str]) -> str:
    """Return the advice for a training that has no kept checkpoint to rewind to."""
    changes = {"dir": f"{folder.parent}-rewound"} | {f"{folder.name}.{name}": value for name, value in values.items()}
    typed = _typed(folder)
    return f"train in a new folder with {change}{f': `{typed.changed(changes)}`' if typed else ''}"


def _typed(folder: Path) -> CommandLine | None:
    noted = folder.parent / COMMAND
    return CommandLine.read(noted.read_text(encoding="utf-8")) if noted.is_file() else None
